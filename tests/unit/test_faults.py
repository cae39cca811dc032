"""The public part of an error never quotes a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt.device.device import Device
from fedbpt.errors import DataError, FedbptError, InputError, TaskError, WireError
from fedbpt.faults import public_reason, public_traceback
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import ErrorReply, EvaluateRequest, RoundPlan, SelectWork
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Template
from fedbpt.tasks import Row, Task, read_rows
from fedbpt.tasks.readers import rows_from_dataset, to_rows
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK

ROW = "canary sings loudly"
SPEC = PromptSpec(d=4)


class MergingScorer(ToyScorer):
    """Merges two characters into a token if the first is a digit, a space or a colon."""

    merges = "1x) :"

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        ids = super().tokenize(text, add_bos).tolist()
        merged: list[int] = []
        while ids:
            token = ids.pop(0)
            merged.append((token + ids.pop(0)) % 256 if ids and token < 256 and chr(token) in self.merges else token)
        return np.array(merged, dtype=np.int32)


class ColonMerger(MergingScorer):
    merges = ":"


class ForeignScorer(ToyScorer):
    """Fails like third-party code, with its arguments in the message."""

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        if "canary" in text:
            raise TypeError(f"incompatible function arguments. Invoked with: {text!r}")
        return super().tokenize(text, add_bos)


def task_of(labels: tuple[str, ...], template: Template) -> Task:
    return Task(name="toy-mood", labels=labels, templates=(template,))


def plan(device: Device, labels: tuple[str, ...], template: Template) -> RoundPlan:
    loss = "cross_entropy" if labels else "nll"
    return RoundPlan(
        run="r",
        round=0,
        device="d",
        seed=1,
        model_fingerprint=device.scorer.fingerprint,
        labels=labels,
        task=task_of(labels, template).identity,
        template=template,
        prompt=SPEC,
        objective=ObjectiveSpec(loss=loss),
        work=SelectWork(templates=(template,)),
    )


def evaluation(device: Device, labels: tuple[str, ...], template: Template) -> EvaluateRequest:
    asked = plan(device, labels, template)
    return EvaluateRequest(
        model_fingerprint=asked.model_fingerprint,
        task=asked.task,
        labels=labels,
        template=template,
        prompt=SPEC,
        objective=asked.objective,
        latents=Array.of(np.zeros((1, 4))),
    )


TARGETS = Template(pattern="{text}\nSummary:", label_words=())
LED = Template(pattern="Read: {text}\nMood:", label_words=("b", "g"))

WORK: dict[str, tuple[ToyScorer, Row, tuple[str, ...], Template]] = {
    "a foreign error": (ForeignScorer(), (ROW, 0), TASK.labels, TASK.templates[0]),
    "a target text for a label": (ToyScorer(), ("fine", ROW), TASK.labels, TASK.templates[0]),
    "a label for a target text": (ToyScorer(), (ROW, 1), (), TARGETS),
    "a target that merges with the cue": (ColonMerger(), ("fine", ROW), (), TARGETS),
    "a text that merges with the head": (MergingScorer(), (ROW, 0), TASK.labels, LED),
    "a text that is too long": (ToyScorer(n_ctx=16), (ROW, 0), TASK.labels, TASK.templates[0]),
}


@pytest.mark.parametrize("case", WORK)
def test_an_error_in_a_devices_work_quotes_no_row_in_public(case: str) -> None:
    scorer, row, labels, template = WORK[case]
    device = Device("d", scorer, [row], [row], [row], task=task_of(labels, template))
    for work in (
        lambda: device.run(plan(device, labels, template)),
        lambda: device.evaluate(evaluation(device, labels, template)),
    ):
        with pytest.raises((FedbptError, TypeError)) as failed:
            work()
        told = public_reason(failed.value) + public_traceback(failed.value)
        assert not [word for word in ROW.split() if word in told]


FILES: dict[str, str] = {
    "label.jsonl": f'{{"text": "x", "label": "{ROW}"}}\n',
    "no-header.csv": f"{ROW},0\n{ROW},1\n",
    "fields.csv": f"text,{ROW}\nx,1,2,3\n",
    "no-column.jsonl": f'{{"{ROW}": "x", "label": 0}}\n',
    "not-json.jsonl": f'{{"text": "{ROW}", "label": }}\n',
    "quotes.csv": f'text,label\n"{ROW}" and,1\n',
    "empty.jsonl": f'{{"text": " ", "label": "{ROW}"}}\n',
    "half.jsonl": f'{{"text": "{ROW} \\ud83d", "label": 0}}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_an_error_in_a_file_gives_only_file_and_line_in_public(name: str, tmp_path: Path) -> None:
    """With Flower, files are read when a message arrives."""
    (tmp_path / name).write_text(FILES[name])
    with pytest.raises(DataError) as failed:
        read_rows(tmp_path / name, ("a", "b"))
    told = public_reason(failed.value)
    assert told.startswith(f"{tmp_path / name}:")
    assert not [word for word in ROW.split() if word in told]


@pytest.mark.parametrize("given", [[(ROW, "c")], [(ROW,)], [{"text": ROW}]])
def test_invalid_pairs_are_identified_by_number_in_public(given: Any) -> None:
    with pytest.raises(DataError) as failed:
        to_rows(given, TASK)
    assert "canary" not in public_reason(failed.value)


def test_an_unknown_label_is_not_quoted_in_public() -> None:
    class Rows(list[Any]):
        column_names = ("text", "label")

    with pytest.raises(DataError, match="sings") as failed:  # its owner reads it
        rows_from_dataset(Rows([{"text": "x", "label": ROW}]), ("a", "b"))
    assert "sings" not in public_reason(failed.value)


def test_the_public_reason_of_our_errors_is_their_message() -> None:
    assert public_reason(TaskError("one label word begins with the other")) == "one label word begins with the other"
    assert public_reason(InputError("token 7", public="a token")) == "a token"


def test_a_path_that_is_not_utf8_can_be_sent() -> None:
    reply = ErrorReply(code="x", message=public_reason(DataError("cannot read m\udcf6del")))
    assert codec.decode(codec.encode(reply), ErrorReply).message == r"cannot read m\udcf6del"


def test_a_message_that_utf8_cannot_encode_is_refused_without_quoting_it() -> None:
    for encode in (codec.encode, codec.encode_json, codec.digest):
        with pytest.raises(WireError) as refused:
            encode(ErrorReply(code="x", message="canary \ud83d"))
        assert "canary" not in str(refused.value)


def test_a_foreign_error_is_described_by_type_module_function_and_line() -> None:
    def fails() -> None:
        raise ValueError(ROW)

    with pytest.raises(ValueError, match="canary") as failed:
        fails()
    assert "ValueError in tests.unit.test_faults." in public_reason(failed.value)
    assert f"fails (line {fails.__code__.co_firstlineno + 1})" in public_reason(failed.value)


def test_an_error_in_a_library_also_gives_our_calling_function() -> None:
    device = Device("d", ForeignScorer(), [(ROW, 0)], task=task_of(TASK.labels, TASK.templates[0]))
    with pytest.raises(TypeError) as of_ours:
        device.run(plan(device, TASK.labels, TASK.templates[0]))
    told = public_reason(of_ours.value)
    assert told.startswith("TypeError in tests.unit.test_faults.")
    assert ", called by fedbpt.tasks.task." in told


def test_the_systems_reason_is_given() -> None:
    with pytest.raises(OSError, match="nowhere") as failed:
        Path("/nowhere/at/all").read_bytes()
    assert "No such file or directory" in public_reason(failed.value)


def test_a_traceback_goes_down_to_the_cause_and_ends_where_causes_go_round() -> None:
    first, second = InputError("outer", public="outer"), KeyError(ROW)
    first.__cause__, second.__cause__ = second, first
    told = public_traceback(first)
    assert told.count("InputError: outer") == told.count("KeyError") == 1
