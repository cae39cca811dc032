"""``fedbpt chat`` with the toy model: questions from standard input or held-out rows, replies as JSON or text."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from fedbpt import Budget, PromptSpec, tune
from fedbpt.cli import chat as chat_command
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.device.device import Device
from fedbpt.net.tokens import write_private
from fedbpt.side_by_side.sides import SideBySide
from fedbpt.tasks import read_task_rows, write_rows
from tests.support.prompt_kinds import KINDS, Kind, prompt_of_kind
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, TASK_FILE, rows
from tests.unit.cli.test_cli import Run, folder, run
from tests.unit.engine.test_text_stream import TASK as MANNER
from tests.unit.engine.test_text_stream import TASK_FILE as MANNER_FILE
from tests.unit.engine.test_text_stream import rows as manner_rows
from tests.unit.prompts.test_prompt import as_of_format_1

__all__ = ["folder", "run"]

SPEC = PromptSpec(d=4, alpha=2.0)
BUDGET = Budget(evaluations=24)


class Typed(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(ToyScorer(), TASK, rows(16), budget=BUDGET, prompt=SPEC).prompt.save(folder / "mood.safetensors")
    tune(ToyScorer(), MANNER, manner_rows(8), budget=BUDGET, prompt=SPEC).prompt.save(folder / "manner.safetensors")
    as_of_format_1(Path(shutil.copy(folder / "mood.safetensors", folder / "old.safetensors")))
    (folder / "mood.toml").write_text(TASK_FILE)
    (folder / "manner.toml").write_text(MANNER_FILE)
    write_rows(folder / "rows.jsonl", rows(20), TASK.labels)
    monkeypatch.setattr(chat_command, "load_model", lambda *_args, **_options: ToyScorer())


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, run: Run):
    def call(text: str, *arguments: str, person: bool = False):
        monkeypatch.setattr("sys.stdin", (Typed if person else io.StringIO)(text))
        return run("chat", "--model", "toy", *arguments)

    return call


MOOD = ("--prompt", "mood.safetensors")


def test_piped_questions_get_a_line_of_json_each(say, folder: Path) -> None:
    answer = say("aaa number 1\n\n  zzz\n", *MOOD, "--json")
    assert (answer.code, answer.err) == (0, "")
    first, second = (json.loads(line) for line in answer.out.splitlines())
    found = SideBySide(ToyScorer(), chat_command.Prompt.load(folder / "mood.safetensors"), TASK).classify("zzz")
    assert first["text"] == "aaa number 1"
    assert second == {
        "text": "zzz",
        "label": None,
        "original": dict(zip(TASK.labels, found.original, strict=True)),
        "tuned": dict(zip(TASK.labels, found.tuned, strict=True)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_all_kinds_reply_here_and_on_a_device(say, folder: Path, kind: Kind) -> None:
    prompt = prompt_of_kind(kind, "front")
    prompt.save(folder / "kind.safetensors")
    asked = ("--prompt", "kind.safetensors", "--json")
    found = SideBySide(ToyScorer(), prompt, TASK).classify("zzz")
    (here,) = say("zzz\n", *asked).out.splitlines()
    assert json.loads(here)["tuned"] == pytest.approx(dict(zip(TASK.labels, found.tuned, strict=True)), abs=1e-6)
    with AgentServer(AgentService(Device("a", ToyScorer(), rows(4), task=TASK))) as server:
        assert say("zzz\n", *asked, "--device", server.url).out.splitlines() == [here]


def test_a_number_chooses_a_held_out_row_and_shows_its_label(say) -> None:
    answer = say("2\n9\n", *MOOD, "--data", "rows.jsonl", "--questions", "3", "--json")
    row, own = (json.loads(line) for line in answer.out.splitlines())
    assert (row["text"], TASK.labels.index(row["label"])) in rows(20)
    assert (own["text"], own["label"]) == ("9", None)  # there is no such row


@pytest.mark.parametrize("typed", ["9" * 5000, "a\0b", "\ufeffhello", "١", "-1", "é" * 3000])
def test_any_line_is_a_question(typed: str, say) -> None:
    answer = say(f"{typed}\n", *MOOD, "--data", "rows.jsonl", "--questions", "3", "--json")
    assert (answer.code, answer.err, len(answer.out.splitlines())) == (0, "", 1)


def test_a_prompt_of_an_earlier_version_works_with_its_task_or_without_rows(say) -> None:
    old = ("--prompt", "old.safetensors", "--json")
    assert say("zzz\n", *old) == say("zzz\n", *MOOD, "--json")
    given = ("--data", "rows.jsonl", "--task", "mood.toml")
    assert say("2\n", *old, *given) == say("2\n", *MOOD, "--data", "rows.jsonl", "--json")


def test_in_a_terminal_there_are_bars_and_the_correct_label(say) -> None:
    answer = say("1\n", *MOOD, "--data", "rows.jsonl", "--questions", "2", person=True)
    assert answer.code == 0
    assert answer.out.startswith("toy: ")
    assert "toy-mood" in answer.out
    assert answer.out.count("number") >= 2
    assert any(f": {label}\n" in answer.out for label in TASK.labels)
    assert "%" in answer.out
    assert "█" in answer.out


def test_texts_are_generated_side_by_side(say) -> None:
    answer = say("question 1\n", "--prompt", "manner.safetensors", "--max-tokens", "4")
    assert answer.code == 0
    assert "original" in answer.out
    assert "tuned" in answer.out
    found = json.loads(say("question 1\n", "--prompt", "manner.safetensors", "--max-tokens", "4", "--json").out)
    assert found["original"] != found["tuned"]
    assert found["target"] is None


def test_a_stop_string_ends_both_replies(say) -> None:
    whole = json.loads(say("question 1\n", "--prompt", "manner.safetensors", "--json").out)["original"]
    cut = json.loads(say("question 1\n", "--prompt", "manner.safetensors", "--json", "--stop", whole[2]).out)
    assert cut["original"] == whole[: whole.index(whole[2])]


@pytest.mark.parametrize("token", [None, "a-token-of-some-length"])
def test_a_connected_device_gives_the_same_replies_as_this_machine(say, folder: Path, token: str | None) -> None:
    with AgentServer(AgentService(Device("a", ToyScorer(), rows(4), task=TASK)), token=token) as server:
        there = ["--device", server.url]
        if token:
            write_private(folder / "token", token.encode())
            there += ["--token-file", "token"]
        manner = ("--prompt", "manner.safetensors", "--max-tokens", "4", "--json")
        for text, given in (("aaa number 1\nzzz\n", (*MOOD, "--json")), ("question 1\n", manner)):
            assert say(text, *given, *there) == say(text, *given)
        shown = say("question 1\n", "--prompt", "manner.safetensors", *there, person=True)
        assert "toy on 127.0.0.1" in shown.out
        assert "original" in shown.out


@pytest.mark.slow
def test_an_unreachable_device_ends_the_session(say) -> None:
    answer = say("word\n", "--prompt", "manner.safetensors", "--device", "http://127.0.0.1:9", "--json")
    assert answer.code == 1
    assert "http://127.0.0.1:9" in answer.err


def test_an_invalid_question_ends_a_pipe_but_not_a_terminal_session(say, monkeypatch) -> None:
    monkeypatch.setattr(chat_command, "load_model", lambda *_args, **_options: ToyScorer(n_ctx=40))
    texts = f"{'word ' * 20}\nshort\n"
    answer = say(texts, "--prompt", "manner.safetensors", "--json")
    assert (answer.code, answer.out) == (2, "")
    assert "shorten the text" in answer.err
    answer = say(texts, "--prompt", "manner.safetensors", person=True)
    assert answer.code == 0
    assert "shorten the text" in answer.out
    assert "original" in answer.out


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--prompt", "absent"), 1, "absent"),
        (("--prompt", "old.safetensors", "--data", "rows.jsonl"), 2, "--task"),
        (("--prompt", "mood.safetensors", "--task", "manner.toml"), 2, str(list(TASK.labels))),
        (("--prompt", "mood.safetensors", "--top-p", "2"), 2, "top_p"),
    ],
)
def test_wrong_options_are_one_line(say, arguments: tuple[str, ...], code: int, named: str) -> None:
    answer = say("x\n", *arguments)
    assert answer.code == code
    assert named in answer.err
    assert len(answer.err.splitlines()) == 1


# --- votes -----------------------------------------------------------------------------------------------------------

MANNERS = ("--prompt", "manner.safetensors", "--max-tokens", "4")


def voted(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_better_reply_becomes_a_row_that_a_device_reads(say, folder: Path) -> None:
    answer = say("aaa\ntuned\nzzz\n\nbbb\nOriginal\nccc\n= my own é\n", *MANNERS, "--json", "--votes", "v/votes.jsonl")
    assert (answer.code, answer.err) == (0, "")
    replies = [json.loads(line) for line in answer.out.splitlines()]
    assert [reply["text"] for reply in replies] == ["aaa", "zzz", "bbb", "ccc"]
    assert voted(folder / "v" / "votes.jsonl") == [
        {"text": "aaa", MANNER.label_column: replies[0]["tuned"].strip()},
        {"text": "bbb", MANNER.label_column: replies[2]["original"].strip()},
        {"text": "ccc", MANNER.label_column: "my own é"},
    ]
    assert len(read_task_rows(MANNER, folder / "v" / "votes.jsonl")) == 3


def test_the_right_label_becomes_a_row(say, folder: Path) -> None:
    assert say(f"aaa\n{TASK.labels[1].upper()}\nzzz\n\n", *MOOD, "--votes", "votes.jsonl", "--json").code == 0
    assert voted(folder / "votes.jsonl") == [{"text": "aaa", "label": TASK.labels[1]}]
    assert read_task_rows(TASK, folder / "votes.jsonl") == [("aaa", 1)]


def test_a_person_is_asked_again_until_the_vote_is_clear(say, folder: Path) -> None:
    answer = say("aaa\nboth\n= no label\n" + TASK.labels[0] + "\n", *MOOD, "--votes", "votes.jsonl", person=True)
    assert answer.code == 0
    assert voted(folder / "votes.jsonl") == [{"text": "aaa", "label": TASK.labels[0]}]


@pytest.mark.parametrize(
    "arguments", [("--votes", "votes.csv"), ("--votes", "votes.jsonl", "--device", "http://127.0.0.1:1")]
)
def test_votes_that_cannot_be_kept_here_are_refused(say, folder: Path, arguments: tuple[str, ...]) -> None:
    answer = say("aaa\ntuned\n", *MOOD, *arguments)
    assert answer.code != 0
    assert "--votes" in answer.err
    assert not (folder / "votes.jsonl").exists()


def test_an_unclear_vote_from_a_program_is_an_error(say, folder: Path) -> None:
    answer = say("aaa\nboth\n", *MOOD, "--votes", "votes.jsonl", "--json")
    assert answer.code != 0
    assert not (folder / "votes.jsonl").exists()
