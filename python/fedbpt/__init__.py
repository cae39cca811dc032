"""Federated black-box prompt tuning: adapt a frozen LLM across devices that keep their data, with forward passes only.

>>> import fedbpt
>>> scorer = fedbpt.load_model("smollm2-135m")
>>> task = fedbpt.tasks.load("ag-news")
>>> result = fedbpt.tune(scorer, task, train, budget=fedbpt.Budget(seconds=60), seed=7)
>>> fedbpt.evaluate(scorer, task, test, prompt=result.prompt).accuracy
"""

from __future__ import annotations

from importlib import metadata

from fedbpt import errors, models, tasks
from fedbpt.api import Budget, EvaluationResult, TuneResult, evaluate, tune
from fedbpt.errors import FedbptError
from fedbpt.messages import ObjectiveSpec, PromptSpec, Template
from fedbpt.native_scorer import Gpu, NativeScorer, gpus, load_model
from fedbpt.prompt import Prompt
from fedbpt.tasks import Task

try:
    __version__ = metadata.version("fedbpt")
except metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "Budget",
    "EvaluationResult",
    "FedbptError",
    "Gpu",
    "NativeScorer",
    "ObjectiveSpec",
    "Prompt",
    "PromptSpec",
    "Task",
    "Template",
    "TuneResult",
    "errors",
    "evaluate",
    "gpus",
    "load_model",
    "models",
    "tasks",
    "tune",
]
