"""Federated black-box prompt tuning: adapt a frozen LLM across devices that keep their data, with forward passes only.

>>> import fedbpt
>>> scorer = fedbpt.load_model("smollm2-135m")
>>> task = fedbpt.tasks.load("ag-news")
>>> result = fedbpt.tune(scorer, task, train, budget=fedbpt.Budget(seconds=60), seed=7)
>>> fedbpt.evaluate(scorer, task, test, prompt=result.prompt).accuracy
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedbpt.version import VERSION

if TYPE_CHECKING:
    from fedbpt import errors, metrics, models, tasks
    from fedbpt.answering import AnswerComparison, answers, compare_answers
    from fedbpt.api import Budget, evaluate, tune
    from fedbpt.calibrating import calibrate
    from fedbpt.engine.features import features
    from fedbpt.engine.native_scorer import Gpu, NativeScorer, gpus, load_model
    from fedbpt.errors import FedbptError
    from fedbpt.exchange import export_prompt, import_prompt
    from fedbpt.model_check import ModelCheck, check_model
    from fedbpt.prompts.prompt import Prompt
    from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec, Template
    from fedbpt.refining import RefineResult, refine
    from fedbpt.results import EvaluationResult, TuneResult
    from fedbpt.target_sampling import SampledTargets, sample_targets
    from fedbpt.tasks import Task

__version__ = VERSION

_MODULES = {
    "answering": ("AnswerComparison", "answers", "compare_answers"),
    "api": ("Budget", "evaluate", "tune"),
    "calibrating": ("calibrate",),
    "errors": ("FedbptError",),
    "exchange": ("export_prompt", "import_prompt"),
    "protocol.specs": ("ObjectiveSpec", "PromptSpec", "Template"),
    "model_check": ("ModelCheck", "check_model"),
    "engine.features": ("features",),
    "engine.native_scorer": ("Gpu", "NativeScorer", "gpus", "load_model"),
    "prompts.prompt": ("Prompt",),
    "refining": ("RefineResult", "refine"),
    "results": ("EvaluationResult", "TuneResult"),
    "target_sampling": ("SampledTargets", "sample_targets"),
    "tasks": ("Task",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AnswerComparison",
    "Budget",
    "EvaluationResult",
    "FedbptError",
    "Gpu",
    "ModelCheck",
    "NativeScorer",
    "ObjectiveSpec",
    "Prompt",
    "PromptSpec",
    "RefineResult",
    "SampledTargets",
    "Task",
    "Template",
    "TuneResult",
    "answers",
    "calibrate",
    "check_model",
    "compare_answers",
    "errors",
    "evaluate",
    "export_prompt",
    "features",
    "gpus",
    "import_prompt",
    "load_model",
    "metrics",
    "models",
    "refine",
    "sample_targets",
    "tasks",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use (PEP 562), so that a device loads only the modules that it needs."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"fedbpt.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        value = import_module(f"fedbpt.{name}")
    else:
        raise AttributeError(f"module 'fedbpt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
