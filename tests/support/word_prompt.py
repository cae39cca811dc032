"""A prompt whose readout uses words, whatever the default is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbpt import Prompt
from fedbpt.api import make_prompt, settings_for
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.one_machine import NAME, clients_of
from fedbpt.device.device import Device
from fedbpt.engine.scorer import Scorer
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Row, Task


def tune_words(scorer: Scorer, task: Task, train: Sequence[Row], **settings: Any) -> Prompt:
    """As `fedbpt.tune`, with ``readout = "words"``. ``settings``: arguments of `fedbpt.api.settings_for`."""
    chosen = settings_for(task, evaluate_every=0, readout="words", **settings)
    with RunStore(None) as store, clients_of(Device(NAME, scorer, train, task=task)) as client:
        result = Federation([client()], task, chosen, chosen.aggregator(), store, "words").run()
    return make_prompt(scorer, task, result)
