"""An OpenAI-compatible server of one model and its tuned prompts, each a model name of its own."""

from fedbpt.serving.answers import ServedModel, served_models
from fedbpt.serving.server import ModelServer

__all__ = ["ModelServer", "ServedModel", "served_models"]
