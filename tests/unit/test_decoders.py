"""Decoding into message types by several threads, see `fedbpt.decoders`."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import msgspec
import pytest

from fedbpt import decoders
from fedbpt.decoders import explain, from_builtins
from fedbpt.runs.run_file import RunConfig
from fedbpt.tasks import Task

# New types again and again, each first decoded by several threads at the same time.
RACE = """
import sys, threading
import msgspec
from fedbpt import decoders
from fedbpt.decoders import explain, from_builtins
from fedbpt.runs.run_file import RunConfig
from fedbpt.tasks import Task

how = getattr(decoders, sys.argv[1])
sys.setswitchinterval(1e-6)
for number in range(150):
    inner = msgspec.defstruct("Inner", [(f"field_{i}", "int | list[str] | None", None) for i in range(40)])
    outer = msgspec.defstruct("Outer", [(f"field_{i}", inner, msgspec.UNSET) for i in range(10)])
    content = {f"field_{i}": {f"field_{i}": i for i in range(40)} for i in range(10)}
    given = {"from_msgpack": msgspec.msgpack.encode, "from_json": msgspec.json.encode, "from_builtins": dict}
    body = given[sys.argv[1]](content)
    ready = threading.Barrier(4)
    right = []
    def decode():
        ready.wait()
        right.append(how(body, outer).field_9.field_39 == 39)
    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4, right
"""


class Pair(msgspec.Struct):
    left: int
    right: list[str]


@pytest.mark.parametrize("name", ["from_msgpack", "from_json", "from_builtins"])
def test_threads_may_be_the_first_to_decode_a_type_at_the_same_time(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", RACE, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_form_is_decoded() -> None:
    pair = Pair(1, ["a"])
    assert decoders.from_msgpack(msgspec.msgpack.encode(pair), Pair) == pair
    assert decoders.from_json(msgspec.json.encode(pair), Pair) == pair
    assert decoders.from_json('{"left": 1, "right": ["a"]}', Pair) == pair
    assert decoders.from_builtins({"left": 1, "right": ["a"]}, Pair) == pair
    with pytest.raises(msgspec.ValidationError):
        decoders.from_builtins({"left": "x", "right": []}, Pair)


def test_one_type_is_collected_at_a_time() -> None:
    Late = msgspec.defstruct("Late", [("left", int)])
    found = []
    with decoders._collecting:
        thread = threading.Thread(target=lambda: found.append(decoders.from_json('{"left": 2}', Late)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not found
    thread.join()
    assert found[0].left == 2


@pytest.mark.parametrize(
    ("raw", "kind", "said"),
    [
        ({"task": "x", "settings": {"round": 3}}, RunConfig, "did you mean 'rounds' in [settings]?"),
        ({"task": "x", "settings": {"placement": "cue"}}, RunConfig, "move it to [settings.prompt]"),
        ({"task": "x", "rounds": 3}, RunConfig, "move it to [settings]"),
        ({"task": "x", "zzz": 3}, RunConfig, "there is no 'zzz': remove it"),
        (
            {"task": "x", "settings": {"readout": "word"}},
            RunConfig,
            "settings.readout = 'word' is not known: use one of",
        ),
        ({"name": "x", "templates": [{"labels_words": []}]}, Task, "did you mean 'label_words' in [templates]?"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_its_words(raw: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        from_builtins(raw, kind)
    assert said in explain(caught.value, kind)


def test_other_errors_are_msgspecs_own() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        from_builtins({"task": 3}, RunConfig)
    assert explain(caught.value, RunConfig) == str(caught.value)
