"""An OpenAI-compatible server of one model and its tuned prompts, each under its own model name."""

from fedbpt.serving.models import ServedModel, served_models
from fedbpt.serving.server import ModelServer

__all__ = ["ModelServer", "ServedModel", "served_models"]
