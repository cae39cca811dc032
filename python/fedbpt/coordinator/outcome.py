"""The result of a run, made at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedbpt.coordinator.devices.members import Member
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport
from fedbpt.protocol.specs import Array, LayerReadout, Readout
from fedbpt.runs.result import BASELINES, NO_ANSWERS, NO_SCORE, AnswerScore, DeviceSummary, RunResult, Score
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import Traffic


def make_result(
    ledger: RunLedger,
    settings: RunSettings,
    model: DeviceInfo,
    members: Iterable[Member],
    costs: Mapping[str, Traffic],
    reports: Mapping[str, EvaluateReport],
    answers: Mapping[str, EvaluateReport],
    dev: Mapping[str, Score],
    total_seconds: float,
) -> RunResult:
    """The result of a run.

    Args:
        model: the info of any device with its model.
        costs: by device.
        reports: of the final evaluation, by device.
        answers: of the evaluation by the task's metric, by device.
        dev: the last scores on ``dev`` rows, by variant; empty: there are none.
    """
    names = list(ledger.state.variants())

    def score(device: str, name: str) -> Score:
        measured = device in reports and name in names
        return Score.of(reports[device], names.index(name)) if measured else NO_SCORE

    def total(name: str) -> Score:
        scores = (Score.of(report, names.index(name)) for report in reports.values() if name in names)
        return sum(scores, NO_SCORE)

    readouts = {purpose: fit.readout for purpose, fit in ledger.state.fits.items()}
    devices = tuple(
        DeviceSummary(
            name=member.name,
            info=member.info,
            reports=ledger.state.n_reports[member.name],
            bytes_up=costs[member.name].bytes_up,
            bytes_down=costs[member.name].bytes_down,
            peak_rss_bytes=costs[member.name].peak_rss_bytes,
            zero_shot=score(member.name, "zero_shot"),
            tuned=score(member.name, "tuned"),
        )
        for member in members
    )
    return RunResult(
        run=ledger.run,
        task=ledger.task.name,
        settings=settings,
        model_fingerprint=model.model_fingerprint,
        model_name=model.model_name,
        template=ledger.state.template,
        shift=ledger.state.prompt.shift or None,
        mean=Array.of(ledger.state.mean),
        digest=ledger.state.aggregator.digest(),
        rounds=ledger.state.searched,
        evaluations=ledger.state.aggregator.evaluations,
        tokens=ledger.spending.tokens,
        seconds=ledger.spending.seconds,
        total_seconds=total_seconds,
        zero_shot=total("zero_shot"),
        tuned=total("tuned"),
        baselines={
            name: sum((Score.of(report, i) for report in reports.values()), NO_SCORE)
            for i, name in enumerate(names)
            if name in BASELINES
        },
        fits={purpose: found for purpose, found in readouts.items() if isinstance(found, Readout)},
        layer_fits={purpose: found for purpose, found in readouts.items() if isinstance(found, LayerReadout)},
        shipped=ledger.state.shipped,
        futile=ledger.is_futile,
        others=ledger.state.others if isinstance(readouts.get("readout"), Readout) else (),
        templates=ledger.state.candidates,
        epsilon=ledger.epsilon(),
        devices=devices,
        dev=dict(dev),
        metric=ledger.task.generation.metric if answers and ledger.task.generation else "",
        answers={
            name: sum((AnswerScore.of(report, i) for report in answers.values()), NO_ANSWERS)
            for i, name in enumerate(names if answers else ())
        },
    )
