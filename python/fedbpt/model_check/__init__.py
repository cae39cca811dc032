"""What holds for a model file: does it load, tokenise, and agree with itself?

>>> from fedbpt import check_model
>>> check_model("smollm2-135m").holds
True
"""

from fedbpt.model_check.findings import CHECKS, Finding, ModelCheck, ModelFacts
from fedbpt.model_check.process import check_model

__all__ = ["CHECKS", "Finding", "ModelCheck", "ModelFacts", "check_model"]
