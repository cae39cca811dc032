"""`RunDisplay`: the live line in a terminal, and lines in a log."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import msgspec
import pytest

from fedbpt.display import console as display
from fedbpt.display.console import STAGE_NAMES, RunDisplay, human_bytes
from fedbpt.display.plain_console import PlainConsole
from fedbpt.protocol.specs import Array, Template
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLeftOut,
    DeviceLost,
    Evaluated,
    Event,
    RoundClosed,
    RoundPurpose,
    RunFinished,
    RunStarted,
    StageBegan,
    TemplateSelected,
)
from fedbpt.runs.result import NO_SCORE, RunResult, Score, TemplateScore
from fedbpt.runs.settings import RunSettings

TEMPLATE = Template(pattern="{text}\n[Topic]:", label_words=(" bad", " good"))


def shown(
    monkeypatch: pytest.MonkeyPatch, *events: Event, visible: bool = True, terminal: bool = True, width: int = 200
) -> str:
    """The output after ``events``, without escape codes."""
    stream = io.StringIO()
    console = PlainConsole(file=stream, width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    monkeypatch.setattr(display, "PlainConsole", lambda **_: console)
    with RunDisplay(visible) as live:
        for event in events:
            live(event)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def lines(*arguments: Any, **options: Any) -> list[str]:
    """The lines of a log."""
    return shown(*arguments, terminal=False, **options).splitlines()


def started(resumed: int = 0, rounds: int = 10, searched: int = 0) -> RunStarted:
    return RunStarted(
        run="r", devices=("a", "b", "c"), live=("a", "b", "c"), model_name="toy", model_fingerprint="f",
        resumed=resumed, searched=searched, settings=RunSettings(rounds=rounds),
    )  # fmt: skip


def closed(
    round: int, seconds: float = 30.0, purpose: RoundPurpose = "search", before: int = 0, rounds: int = 10
) -> RoundClosed:
    """Round ``round``, after ``before`` rounds of other stages; the search has ``rounds``."""
    share = (round - before) / rounds
    return RoundClosed(
        round=round, purpose=purpose, searched=round - before, reported=("a", "b"), missing=("c",), loss=0.51,
        evaluations=16 * round, tokens=1000, seconds=seconds, bytes_up=900, bytes_down=5400,
        share=share, eta_s=seconds / share * (1 - share) if share else None,
    )  # fmt: skip


def result() -> RunResult:
    return RunResult(
        run="r", task="t", settings=RunSettings(), model_fingerprint="f", model_name="toy", template=TEMPLATE,
        mean=Array.of([0.0]), digest="d", rounds=1, evaluations=1, tokens=1, seconds=1.0, total_seconds=1.0,
        zero_shot=NO_SCORE, tuned=NO_SCORE, baselines={}, fits={}, devices=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (12_345_678, "12.3 MB"), (7e9, "7.0 GB"), (7e12, "7000.0 GB")],
)
def test_bytes_are_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_the_line_has_the_main_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    score, better = Score(n=10, correct=7, loss_sum=1.0), Score(n=10, correct=9, loss_sum=1.0)
    first = Evaluated(round=0, score=score, zero_shot=score, devices=("a",))
    later = Evaluated(round=2, score=better, zero_shot=score, devices=("a",))
    text = shown(monkeypatch, started(), first, closed(1), later, closed(3))
    for part in (
        "round 3",
        "acc 0.900 [0.596, 0.982]  zero-shot 0.700",
        "loss 0.510",
        "2/3 devices",
        "up 900 B  down 5.4 KB",
    ):
        assert part in text
    assert "eta 1:10" in text  # 30 s for three rounds of ten


def test_a_terminal_of_80_columns_shows_bar_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    score = Score(n=10, correct=7, loss_sum=1.0)
    events = [Evaluated(round=round, score=score, devices=("a",)) for round in (0, 2)]
    [*_, line] = shown(monkeypatch, started(), *events, closed(3), width=80).splitlines()
    assert len(line) <= 80
    for part in ("round 3", "━━", "eta 1:10", "acc 0.700"):
        assert part in line


def test_without_a_terminal_progress_is_printed_as_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    template = TemplateSelected(template=TEMPLATE, index=0, losses=(0.5,))
    rounds = [closed(round, rounds=30) for round in range(1, 31)]
    before = [started(rounds=30), template, StageBegan(stage="search")]
    said = lines(monkeypatch, *before, *rounds, closed(31, purpose="readout", before=1, rounds=30))
    assert said[:3] == ["selecting a template on toy", r"template '{text}\n[Topic]:' with bad, good", "search"]
    assert (
        len([line for line in said if line.startswith("round ")]) == 11
    )  # the first, and one for each tenth of the budget
    assert said[-1].startswith("readout")
    assert "eta" in said[4]
    assert "━" not in "".join(said)


def test_slow_rounds_are_all_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "MAX_SILENCE_S", 0.0)
    said = lines(monkeypatch, started(rounds=100), *(closed(round) for round in range(1, 6)))
    assert len([line for line in said if line.startswith("round ")]) == 5
    assert lines(monkeypatch, started(), closed(1), visible=False) == []


def test_the_last_evaluation_is_shown_when_no_round_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    score, better = Score(n=10, correct=7, loss_sum=1.0), Score(n=10, correct=9, loss_sum=1.0)
    events = [closed(3), Evaluated(round=3, score=better, zero_shot=score, devices=("a",))]
    for text in (shown(monkeypatch, started(rounds=3), *events), "\n".join(lines(monkeypatch, started(), *events))):
        assert "acc 0.900" in text.splitlines()[-1]
        assert "zero-shot 0.700" in text.splitlines()[-1]


def test_a_stage_is_shown_from_its_start_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage, name in STAGE_NAMES.items():
        text = shown(monkeypatch, started(), closed(3), StageBegan(stage=stage))
        assert (name if stage != "selection" else "round 3") in text.splitlines()[-1]
        assert "eta 1:10" in text.splitlines()[-1]


def test_rounds_of_other_stages_are_named_and_not_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    for purpose, said in (
        ("calibration", "calibration"),
        ("probe", "first readout"),
        ("readout", "readout"),
    ):
        text = shown(monkeypatch, started(), closed(7, purpose=purpose, before=4))
        assert said in text
        assert "round" not in text
    assert "round 3" in shown(monkeypatch, started(), closed(7, before=4))


def test_important_messages_stay_above_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    guesses = TemplateScore(template=TEMPLATE, score=Score(n=32, correct=16, loss_sum=9.0))
    text = shown(
        monkeypatch,
        started(resumed=6, searched=4),
        TemplateSelected(template=TEMPLATE, index=0, losses=(0.5,), candidates=(guesses,)),
        DeviceLost(device="c", round=5, reason="c: [Errno 111] refused"),
        DeviceLeftOut(device="d", round=6, reason="left out of the readout"),
        DeviceBack(device="c", round=7),
    )
    assert "run r: resumed after 4 rounds" in text
    assert r"template '{text}\n[Topic]:' with bad, good" in text
    assert r"0.500 [0.336, 0.664] of 32 training rows, no better than chance (0.500): '{text}\n[Topic]:'" in text
    assert "device c is lost: [Errno 111] refused" in text
    assert "device d: left out of the readout" in text
    assert "device c is back" in text


def test_a_run_that_was_finished_before_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "run r was finished before"
    assert said in shown(monkeypatch, RunFinished(result=result()))
    assert said not in shown(monkeypatch, started(), RunFinished(result=result()))


def test_a_hidden_display_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = DeviceLost(device="c", round=5, reason="gone")
    for terminal in (True, False):
        assert shown(monkeypatch, started(), lost, closed(1), visible=False, terminal=terminal) == ""


def test_the_line_shows_perplexity_for_target_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    template = Template(pattern="{text}\nReply:", label_words=())
    before, after = (Score(n=4, correct=0, loss_sum=4 * math.log(value)) for value in (80.0, 65.6))
    text = shown(
        monkeypatch, started(), TemplateSelected(template=template, index=0, losses=()),
        Evaluated(round=0, score=before, zero_shot=before, devices=("a",)),
        Evaluated(round=5, score=after, zero_shot=before, devices=("a",)), closed(5),
    )  # fmt: skip
    assert "ppl 65.60  zero-shot 80.00" in text
    assert "acc" not in text
    assert " with " not in text


def test_a_private_run_shows_epsilon_instead_of_its_noisy_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, started(), msgspec.structs.replace(closed(2), epsilon=1.234))
    assert "ε 1.23" in text
    assert "loss" not in text
