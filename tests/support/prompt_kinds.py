"""Prompts of every kind: a readout of words, of layers with or without a prompt, a calibrated bias alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final, Literal, TypeAlias

import msgspec

from fedbpt import Budget, Prompt, PromptSpec, tune
from fedbpt.api import make_prompt, settings_for
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.one_machine import NAME, clients_of
from fedbpt.device.device import Device
from fedbpt.engine.scorer import Scorer
from fedbpt.protocol.specs import PromptPlace
from fedbpt.runs.result import RunResult, Shipped
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Row, Task
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows


def tune_words(scorer: Scorer, task: Task, train: Sequence[Row], **settings: Any) -> Prompt:
    """As `fedbpt.tune`, with ``readout = "words"``. ``settings``: arguments of `fedbpt.api.settings_for`."""
    chosen = settings_for(task, evaluate_every=0, readout="words", **settings)
    with RunStore(None) as store, clients_of(Device(NAME, scorer, train, task=task)) as client:
        result = Federation([client()], task, chosen, chosen.aggregator(), store, "words").run()
    return make_prompt(scorer, task, result)


Kind: TypeAlias = Literal["words", "calibrated", "probe", "prompt", "read"]

KINDS: Final[tuple[Kind, ...]] = ("words", "calibrated", "probe", "prompt", "read")
"""``words``: a readout of words; the others: what held-out rows may choose (`fedbpt.runs.result.Shipped`)."""


def shipping(run: RunResult, name: Shipped) -> RunResult:
    """``run`` as if held-out rows had chosen another of its lines."""
    return msgspec.structs.replace(run, shipped=name)


@cache
def prompt_of_kind(kind: Kind, placement: PromptPlace = "cue") -> Prompt:
    """A prompt for `ToyScorer` and `TASK`."""
    spec = PromptSpec(d=6, alpha=2.0, placement=placement)
    given: dict[str, Any] = {"budget": Budget(evaluations=48), "prompt": spec, "popsize": 8}
    if kind == "words":
        return tune_words(ToyScorer(), TASK, rows(40), **given)
    return make_prompt(ToyScorer(), TASK, shipping(_tuned(placement), kind))


@cache
def _tuned(placement: PromptPlace) -> RunResult:
    spec = PromptSpec(d=6, alpha=2.0, placement=placement)
    return tune(ToyScorer(), TASK, rows(40), budget=Budget(evaluations=48), prompt=spec, popsize=8, show=False).run
