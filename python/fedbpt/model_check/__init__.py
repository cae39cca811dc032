"""Checks of a model file: does it load and tokenise, and are its scores consistent?

>>> from fedbpt import check_model
>>> check_model("smollm2-135m").holds
True
"""

from fedbpt.model_check.findings import CHECKS, Finding, ModelCheck, ModelFacts
from fedbpt.model_check.process import check_model

__all__ = ["CHECKS", "Finding", "ModelCheck", "ModelFacts", "check_model"]
