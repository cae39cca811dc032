"""`Planner`: what devices do next, from a run's state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec import UNSET

from fedbpt.coordinator.devices.stragglers import TextPace
from fedbpt.coordinator.run_state import RunState
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan, RoundReport, SelectWork, Work
from fedbpt.protocol.specs import Array, LayerReadout, ObjectiveSpec, Readout
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import Variants


class Planner:
    """Makes the work, plans and evaluation requests of one run.

    Attributes:
        model_fingerprint: of the run's model; set when the run is opened, unused by `work`.
    """

    def __init__(self, run: str, state: RunState) -> None:
        self.model_fingerprint = ""
        self._run = run
        self._state = state
        self._pace = TextPace()
        self.by_metric = False
        """Whether the search is in the part of its budget that rates candidates by the metric of their answers."""

    def for_state(self, state: RunState) -> Planner:
        """The same planner on another state."""
        made = copy.copy(self)
        made._state = state
        return made

    def learn_pace(self, reports: Sequence[RoundReport]) -> None:
        """Learn from a round of the search how long each device takes for a text."""
        for report in reports:
            self._pace.took(report.device, report.seconds, report.n_texts)

    def work(self, round: int, purpose: RoundPurpose) -> Work:
        """What the devices do in ``round``."""
        state = self._state
        if purpose == "selection":
            templates = state.task.templates
            # With one template, only the label counts are needed.
            max_rows = state.settings.select_rows if len(templates) > 1 else 1
            return SelectWork(templates=templates, max_rows=max_rows, by_label=state.settings.balanced)
        if purpose == "search":
            return state.aggregator.work(round)
        return state.fit(purpose).work()

    def plan(self, round: int, device: str, work: Work) -> RoundPlan:
        """The plan that ``device`` is sent in ``round``."""
        state = self._state
        settings = self._state.settings
        bias = state.label_bias
        return RoundPlan(
            run=self._run,
            round=round,
            device=device,
            seed=settings.seed,
            model_fingerprint=self.model_fingerprint,
            task=state.task.identity,
            labels=state.task.labels,
            template=state.template,
            prompt=state.prompt,
            objective=self._objective(work),
            work=work,
            batch_size=self._batch_size(device, work),
            deadline_s=settings.deadline_s,
            label_bias=() if bias is None else tuple(bias.tolist()),
            label_weights=state.label_weights,
            privacy=settings.privacy,
            held=state.held if kind_of(work).searches and state.holds_rows else None,
        )

    def _objective(self, work: Work) -> ObjectiveSpec:
        objective = self._state.settings.objective
        if self.by_metric and kind_of(work).searches:
            return objective
        if isinstance(work, SelectWork) and len(work.templates) > 1 and self._state.selects_by_answers:
            return msgspec.structs.replace(objective, generation=self._state.task.generation)
        return msgspec.structs.replace(objective, generation=UNSET)

    def _batch_size(self, device: str, work: Work) -> int | None:
        settings = self._state.settings
        usual = settings.objective.batch_size
        if not (settings.even_rounds and usual and kind_of(work).searches):
            return None
        return self._pace.batch_size(device, usual)

    def request(
        self,
        lines: Variants,
        label_weights: tuple[float, ...] = (),
        split: Literal["dev", "test", "held"] = "test",
        max_rows: int = 0,
        answers: bool = False,
    ) -> EvaluateRequest:
        """A request to evaluate ``lines``, in their order; for the other arguments see `EvaluateRequest`.

        ``answers``: by the metric of the task.
        """
        state = self._state
        settings = self._state.settings
        readouts = [readout if isinstance(readout, Readout) else None for _, readout in lines.values()]
        layered = [readout if isinstance(readout, LayerReadout) else None for _, readout in lines.values()]
        return EvaluateRequest(
            model_fingerprint=self.model_fingerprint,
            task=state.task.identity,
            labels=state.task.labels,
            template=state.template,
            prompt=state.prompt,
            objective=msgspec.structs.replace(settings.objective, generation=UNSET),
            latents=Array.of(np.stack([latent for latent, _ in lines.values()])),
            readouts=tuple(readouts),
            others=state.others if any(readout and readout.others for readout in readouts) else (),
            layer_readouts=tuple(layered) if any(layered) else (),
            label_weights=label_weights,
            split=split,
            held=state.held if split == "held" else None,
            max_rows=max_rows,
            generation=state.task.generation if answers else UNSET,
        )
