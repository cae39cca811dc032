"""JSON and TOML with any content are read, or are a `FedbptError` of one line, or over HTTP a 400."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedbpt import Prompt, tasks
from fedbpt.bench.comparison import read_measurement
from fedbpt.device.agent.http import build_app
from fedbpt.device.agent.service import AgentService
from fedbpt.device.device import Device
from fedbpt.errors import FedbptError
from fedbpt.exchange import import_prompt
from fedbpt.net.tokens import Credentials
from fedbpt.protocol import codec
from fedbpt.protocol.questions import Question
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan
from fedbpt.runs.run_file import load_config
from fedbpt.serving.models import served_models
from fedbpt.serving.server import ModelServer
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

VALUES = {
    "many digits": "9" * 5000,
    "many digits after a point": "0." + "9" * 5000,
    "a large exponent": "1e999999",
    "a large number": "9" * 30,
    "NaN": "NaN",
    "infinity": "-Infinity",
    "depth of lists": "[" * 20_000 + "]" * 20_000,
    "depth of objects": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "half a character": '"\\ud800"',
    "NUL": '"a\\u0000b"',
    "a raw NUL": '"a\0b"',
    "a long text": json.dumps("long" * 5000),
    "null": "null",
    "true": "true",
    "an object": "{}",
    "a list": "[[]]",
    "a negative number": "-1",
    "a fraction": "0.5",
}
WHOLES = {
    "nothing": b"",
    "NUL": b"\0",
    "only a mark": b"\xef\xbb\xbf",
    "invalid UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "null": b"null",
    "a number": b"9" * 5000,
    "a list": b"[]",
    "depth": b"[" * 20_000,
    "cut short": b'{"a": ',
}


def variants(right: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Each member with each of `VALUES`, each member twice, and `WHOLES`."""
    yield from WHOLES.items()
    for name in right:
        others = [f"{json.dumps(other)}: {json.dumps(value)}" for other, value in right.items() if other != name]
        for what, value in VALUES.items():
            yield f"{name}: {what}", f"{{{', '.join([*others, f'{json.dumps(name)}: {value}'])}}}".encode()
        yield f"{name} twice", json.dumps(right).replace("{", f'{{"{name}": 3, ', 1).encode()


TASK_JSON = msgspec.to_builtins(TASK)
ROW = {"text": "a text", "label": "positive"}
HEADER = {
    **{"format": 2, "spec": {"d": 4}, "task_name": TASK.name, "labels": TASK.labels, "model_fingerprint": "x"},
    **{"template": TASK_JSON["templates"][0], "model_name": "toy", "architecture": "toy", "history": [{"a": 1}]},
}


def read_prompt(content: bytes) -> None:
    tensors = {"rows": np.ones((1, 8), dtype=np.float32), "label_bias": np.zeros(2, dtype=np.float32)}
    whole = safetensors.numpy.save(tensors, metadata={"fedbpt": content.decode("utf-8", "replace")})
    Prompt.decode(whole, "prompt.safetensors")


def from_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def reads(content: bytes) -> None:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
        Path(name).chmod(0o600)
        read(Path(name))

    return reads


READERS: dict[str, tuple[dict[str, Any], Callable[[bytes], object]]] = {
    "task": (TASK_JSON, from_file("task.json", tasks.load_task)),
    "rows": (ROW, from_file("rows.jsonl", lambda path: tasks.read_task_rows(TASK, path))),
    "list of rows": (ROW, from_file("rows.json", lambda path: tasks.read_task_rows(TASK, path))),
    "drafted rows": (ROW, from_file("rows.jsonl", lambda path: tasks.draft_task(path))),
    "manifest": (
        {"labels": ["a"], "scheme": "iid"},
        from_file("parts/manifest.json", lambda p: tasks.read_manifest(p.parent)),
    ),
    "measurement": ({"cpu": "x"}, from_file("measured.json", read_measurement)),
    "prompt": (HEADER, read_prompt),
    "adapter": (
        {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_transformer_submodules": 1},
        from_file("adapter/adapter_config.json", lambda path: import_prompt(path.parent, ToyScorer(), TASK)),
    ),
    "credentials": (
        {"coordinator": "https://c", "device": "a", "secret": "s"},
        from_file("credentials.json", Credentials.load),
    ),
    "plan": ({"run": "r", "round": 1, "seed": 0}, lambda content: codec.decode_json(content, RoundPlan)),
    "evaluation": ({"labels": ["a"], "latents": {}}, lambda content: codec.decode_json(content, EvaluateRequest)),
    "question": (
        {"model_fingerprint": "x", "prompt": "", "text": "a", "seed": 3, "temperature": 0.5, "stop": ["a"]},
        lambda content: codec.decode_json(content, Question),
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_any_json_is_read_or_refused_in_one_line(name: str) -> None:
    right, read = READERS[name]
    faults = []
    for what, content in variants(right):
        try:
            read(content)
        except FedbptError as error:
            if len(str(error).splitlines()) != 1:
                faults.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            faults.append(f"{what}: {type(error).__name__}: {error!s:.200}")
    assert "\n".join(faults) == ""


TOML_VALUES = {
    **{what: value for what, value in VALUES.items() if not what.startswith(("NaN", "infinity", "depth of objects"))},
    **{"NaN": "nan", "infinity": "-inf", "a date": "2020-01-01", "no value": "", "a table": "{a = {b = 1}}"},
}


@pytest.mark.parametrize(
    ("name", "right", "read"),
    [
        ("task.toml", {"name": "a", "labels": ["b"], "max_text_tokens": 9, "text_columns": ["d"]}, tasks.load_task),
        (
            "run.toml",
            {"task": "ag-news", "run": "r", "store": "s.db", "model": "m", "devices": ["http://a"], "prompt_file": "p"},
            load_config,
        ),
        ("run.toml", {"seed": 0, "deadline_s": 1.0, "robust": "none", "popsize": 8, "rounds": 3}, load_config),
    ],
)
def test_any_toml_is_read_or_refused_in_one_line(
    name: str, right: dict[str, Any], read: Callable[[Path], object], folder: Path
) -> None:
    faults = []
    head = 'task = "ag-news"\n[settings]\n' if "seed" in right else ""
    contents = list(WHOLES.items())
    for changed in right:
        for what, value in TOML_VALUES.items():
            lines = [f"{key} = {value if key == changed else json.dumps(right[key])}" for key in right]
            contents.append((f"{changed}: {what}", "\n".join([head, *lines]).encode()))
    for what, content in contents:
        (folder / name).write_bytes(content)
        try:
            read(folder / name)
        except FedbptError as error:
            if len(str(error).splitlines()) != 1:
                faults.append(f"{what}: {error}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            faults.append(f"{what}: {type(error).__name__}: {error!s:.200}")
    assert "\n".join(faults) == ""


@pytest.mark.parametrize(
    ("name", "content"), [("task.json", json.dumps(TASK_JSON)), ("task.toml", tasks.task_toml(TASK))]
)
def test_a_task_file_may_begin_with_the_mark_that_windows_writes(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content, encoding="utf-8-sig")
    assert tasks.load_task(name).templates == TASK.templates


ASKED = {
    "chat/completions": {
        **{"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0.5},
        **{"top_k": 3, "seed": 1},
    },
    "completions": {"model": "toy", "prompt": [1, 2], "max_tokens": 2, "logprobs": 1},
}


@pytest.mark.parametrize("path", ASKED)
def test_any_request_to_a_served_model_is_answered_or_a_400(path: str) -> None:
    faults = []
    with ModelServer(served_models(ToyScorer(), [], {})) as server, httpx.Client(base_url=server.url) as client:
        for what, content in variants(ASKED[path]):
            answer = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
            if answer.status_code not in (200, 400, 404):
                faults.append(f"{what}: {answer.status_code} {answer.text:.200}")
    assert "\n".join(faults) == ""


@pytest.mark.parametrize(
    ("path", "name"), [("rounds/r/1", "plan"), ("evaluate", "evaluation"), ("questions", "question")]
)
def test_any_request_to_a_device_is_accepted_or_refused(path: str, name: str) -> None:
    service = AgentService(Device("a", ToyScorer(), rows(4), task=TASK))
    try:
        assert "\n".join(asyncio.run(_posted(service, f"/v1/{path}", variants(READERS[name][0])))) == ""
    finally:
        service.close()


async def _posted(service: AgentService, path: str, contents: Iterator[tuple[str, bytes]]) -> list[str]:
    transport = httpx.ASGITransport(build_app(service))
    faults = []
    async with httpx.AsyncClient(transport=transport, base_url="http://device") as client:
        for what, content in contents:
            answer = await client.post(path, content=content, headers={"content-type": "application/json"})
            if answer.status_code not in (202, 400, 409, 413, 422):
                faults.append(f"{what}: {answer.status_code} {answer.text:.200}")
    return faults
