"""The exception tree is what its docstring draws; every message in the source is one line which says what to do."""

from __future__ import annotations

import inspect
import re
from typing import Final

import pytest

import fedbpt.errors
from fedbpt.errors import DeviceRefusedError, FedbptError, MissingExtraError
from tests.support.error_messages import HOLE, Message, Package

DRAWN = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?")


def all_errors() -> list[type[FedbptError]]:
    return [
        value for value in vars(fedbpt.errors).values() if inspect.isclass(value) and issubclass(value, FedbptError)
    ]


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Map each name in the module's docstring to the names of its bases."""
    tree: dict[str, tuple[str, ...]] = {}
    ancestors: list[str] = []
    block = (fedbpt.errors.__doc__ or "").split("::\n\n")[1].split("\n\n")[0]
    for line in block.splitlines():
        match = DRAWN.match(line)
        assert match, line
        depth = len(match["indent"]) // 4 - 1
        parents = ancestors[depth - 1 : depth] if depth else ["Exception"]
        tree[match["name"]] = (*parents, *([match["also"]] if match["also"] else []))
        ancestors[depth:] = [match["name"]]
    return tree


def test_the_docstring_draws_the_actual_tree() -> None:
    assert drawn_tree() == {error.__name__: tuple(base.__name__ for base in error.__bases__) for error in all_errors()}


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_has_an_exit_code_and_a_docstring(error: type[FedbptError]) -> None:
    assert error.exit_code in (1, 2, 130)
    assert error.__doc__


def test_a_refusal_has_a_code_for_programs() -> None:
    assert DeviceRefusedError("no").code == "refused"
    assert DeviceRefusedError("busy with another round", "busy").code == "busy"


def test_a_missing_extra_says_what_to_install() -> None:
    assert "pip install 'fedbpt[data]'" in str(MissingExtraError("reading data sets from the hub", "data"))


# --- every message in the source -------------------------------------------------------------------------------------

PACKAGES: Final = ("",)
"""Where messages are held to the rule, as beginnings of paths in the package; ``("",)``: everywhere."""

NAMES: Final = ("Flower", "Flower's", "Hugging", "Python", "PyTorch", "TensorBoard", "SuperLink", "SuperNode")
"""Names that a message may begin with."""

ACTIONS: Final = (
    "add allow ask begin build call change check chmod choose clear close compile configure connect convert copy "
    "correct create cut delete disable download drop end enrol enter export fetch fill find fix format free generate "
    "get give grant import increase install join keep leave let list load lower make merge mount move name "
    "omit open partition pass pick pip provide put quote raise read rebuild recreate reduce regenerate "
    "register remove rename reopen repeat replace report request resend restart restore retry run save say see "
    "select send separate serve set shorten shrink specify split start state stop supply switch take tokenize "
    "train trust try tune unset update upgrade use wait write"
).replace(" ", "|")
"""Verbs that a remedy begins with."""

SAYS_WHAT_TO_DO: Final = re.compile(
    rf"""
      (^|[:;,(]\ )((or|and|then|either|otherwise|first|on\ this\ machine)\ )*({ACTIONS})\b  # an action
    | \b(or|and)\ ({ACTIONS})\b
    | \b(must|expected|expects|requires?|needs?|needed|at\ most|at\ least|limit|maximum|minimum|only|one\ of|supports)\b
    | `[^`]+`       # a command
    | \?\)?$        # a question: what to check
    | :\ {HOLE}$    # the text of another error, which says it
    """,
    re.VERBOSE,
)

NOTHING_TO_DO: Final = {
    r"^DeviceRefusedError: this device …$": "a Misfit's reason says it",
    r"^InputError: device … …$": "a Misfit's reason says it",
    r"^DownloadError: cannot download .*: it …$": "the problem with the certificate says it",
    r"^ScoringInterrupted: ": "the caller cancelled it",
    r" was cancelled$": "whoever reads it, or a program, cancelled it",
}
"""Messages, each after its error's name, that need not say what to do, with the reason."""


def faults_of(message: Message) -> list[str]:
    text = message.text
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    is_exempt = any(re.search(pattern, f"{message.error}: {text}") for pattern in NOTHING_TO_DO)
    found = {
        "is empty": not text.strip(),
        "is more than one line": "\n" in text,
        "ends in a full stop": text.endswith((".", "!")) and not text.endswith("..."),
        "begins with a capital": first[:1].isupper() and first.istitle() and first not in NAMES,
        "does not say what to do or what was expected": not (
            SAYS_WHAT_TO_DO.search(text) or message.is_public or is_exempt
        ),
    }
    return [fault for fault, is_so in found.items() if is_so]


def test_every_error_is_one_line_which_says_what_to_do() -> None:
    messages = [message for message in Package().messages() if message.file.startswith(PACKAGES)]
    assert messages
    wrong = [f"{message} {fault}" for message in messages for fault in faults_of(message)]
    assert not wrong, "\n".join(wrong)


def test_the_rule_tells_messages_that_say_what_to_do_from_those_that_do_not() -> None:
    def faults(text: str) -> int:
        return len(faults_of(Message("x.py", 1, "InputError", text)))

    good = [
        "alpha must be positive, got …",
        "unknown format …: choose one of …",
        "GGUF file … is damaged: fetch it again",
    ]
    bad = ["", "two\nlines: use one", "use one.", "Use one", "the counts disagree", "this used to take one"]
    assert [faults(text) for text in good] == [0] * len(good)
    assert all(faults(text) for text in bad)
