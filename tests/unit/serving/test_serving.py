"""The OpenAI-compatible server with the toy model, called by OpenAI's own client over a socket."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import msgspec
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from fedbpt import Budget, Prompt, PromptSpec, tune
from fedbpt.engine.text_generator import GREEDY, Placed, Sampling
from fedbpt.engine.text_stream import Generation
from fedbpt.errors import ConfigError
from fedbpt.net import server as http_server
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.protocol.specs import Generation as Answering
from fedbpt.serving import ModelServer, scheduler, served_models
from fedbpt.serving.protocol import CompletionRequest
from fedbpt.serving.server import SEND_BUFFER_BYTES
from fedbpt.side_by_side.sides import SideBySide
from fedbpt.tasks import Task
from fedbpt.tasks.task import render_ids
from tests.support.prompt_kinds import Kind, prompt_of_kind
from tests.support.raises import raises
from tests.support.toy_generator import PLACES
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.engine.test_text_stream import TASK as MANNER
from tests.unit.engine.test_text_stream import rows as manner_rows

TOKEN = "a-token-of-some-length"
BUDGET = Budget(evaluations=24)
USER = [{"role": "user", "content": "question 1"}]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    mood = tune(ToyScorer(), TASK, rows(16), budget=BUDGET, prompt=PromptSpec(d=4, alpha=2.0)).prompt
    spec = PromptSpec(d=4, alpha=2.0, placement="front", n_prompt=2)
    manner = tune(ToyScorer(), MANNER, manner_rows(8), budget=BUDGET, prompt=spec).prompt
    return [mood, manner, mood]


@pytest.fixture
def scorer() -> ToyScorer:
    return ToyScorer()


@pytest.fixture
def server(scorer: ToyScorer, prompts: list[Prompt]) -> Iterator[ModelServer]:
    with ModelServer(served_models(scorer, prompts, {TASK.name: TASK})) as server:
        yield server
        scorer.generator.pace.set()


@pytest.fixture
def client(server: ModelServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: ModelServer, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30, **options)


def greedy(text: str, n: int, **options: Any) -> str:
    model = ToyScorer()
    generation = Generation(model.generator, Placed(model.tokenize(text)), Sampling(), n, **options)
    return "".join(piece.text for piece in generation)


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_plain_model_and_each_prompt_have_a_name(client: openai.OpenAI) -> None:
    names = ["toy", "toy+toy-mood", "toy+manner", "toy+toy-mood-2"]
    listed = client.models.list().data
    assert [model.id for model in listed] == names
    assert {(model.object, model.owned_by) for model in listed} == {("model", "fedbpt")}
    assert client.models.retrieve("toy+manner").id == "toy+manner"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=USER)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert "'gpt'" in str(caught.value)
    assert "toy, toy+toy-mood" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


# --- the plain model -------------------------------------------------------------------------------------------------


def test_a_completion_continues_the_text(client: openai.OpenAI) -> None:
    found = client.completions.create(model="toy", prompt="once", max_tokens=6, temperature=0)
    assert found.object == "text_completion"
    assert found.choices[0].text == greedy("once", 6)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
    }


def test_several_prompts_have_a_choice_each(client: openai.OpenAI) -> None:
    found = client.completions.create(model="toy", prompt=["once", "twice"], max_tokens=4, temperature=0)
    assert [(choice.index, choice.text) for choice in found.choices] == [
        (0, greedy("once", 4)),
        (1, greedy("twice", 4)),
    ]
    assert found.usage.completion_tokens == 8


def test_token_ids_are_continued(client: openai.OpenAI) -> None:
    ids = ToyScorer().tokenize("once").tolist()
    found = client.completions.create(model="toy", prompt=ids, max_tokens=4, temperature=0)
    assert found.choices[0].text == greedy("once", 4)


def test_chat_puts_the_messages_into_the_models_template(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    found = client.chat.completions.create(model="toy", messages=messages, max_completion_tokens=5, temperature=0)
    assert found.object == "chat.completion"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == greedy("system: be brief\nuser: hi\nassistant:", 5)


@pytest.mark.parametrize("name", ["toy", "toy+manner"])
def test_a_stream_has_the_same_text_in_pieces(client: openai.OpenAI, name: str) -> None:
    asked: dict[str, Any] = {"model": name, "messages": USER, "max_tokens": 6, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert len([piece for piece in said if piece]) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_of_completions_has_each_choice_under_its_index(client: openai.OpenAI) -> None:
    said = {0: "", 1: ""}
    asked: dict[str, Any] = {"model": "toy", "prompt": ["once", "twice"], "max_tokens": 4, "temperature": 0}
    for chunk in client.completions.create(**asked, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == {0: greedy("once", 4), 1: greedy("twice", 4)}


def test_a_tuned_model_replies_as_its_task_is_measured() -> None:
    """Greedily, as long and until the stop string that its [generation] says, unless the request says otherwise."""
    scorer, place = ToyScorer(), PromptSpec(d=4, alpha=2.0)
    prompt = tune(scorer, MANNER, manner_rows(8), budget=Budget(evaluations=16), prompt=place, show=False).prompt
    whole = "".join(piece.text for piece in SideBySide(scorer, prompt).generation("x", "tuned", GREEDY, 8))
    task = msgspec.structs.replace(MANNER, generation=Answering(max_tokens=5, stop=(whole[3],)))
    model = served_models(scorer, [prompt], {"manner": task})["toy+manner"]
    assert model.recommended == GREEDY
    request = CompletionRequest(model="toy+manner", prompt="x")
    short = "".join(piece.text for piece in model.complete("x", request.settings(model.recommended)))
    assert short == whole[:5].partition(whole[3])[0]
    longer = CompletionRequest(model="toy+manner", prompt="x", max_tokens=8, stop=[])
    assert "".join(piece.text for piece in model.complete("x", longer.settings(model.recommended))) == whole


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    whole = greedy("once", 8)
    asked: dict[str, Any] = {"model": "toy", "prompt": "once", "max_tokens": 8, "temperature": 0, "stop": [whole[3]]}
    found = client.completions.create(**asked).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(whole[3])], "stop")
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert streamed == found.text


def test_a_seed_gives_the_same_text_again(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        asked: dict[str, Any] = {"model": "toy", "prompt": "once", "max_tokens": 8, "temperature": 1.5, "seed": seed}
        return client.completions.create(**asked).choices[0].text

    assert text(1) == text(1) != text(2)


def test_log_probabilities_come_in_both_forms(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "toy", "max_tokens": 3, "temperature": 0}
    chat = client.chat.completions.create(**asked, messages=USER, logprobs=True, top_logprobs=2).choices[0]
    assert len(chat.logprobs.content) == 3
    for entry in chat.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    text = client.completions.create(**asked, prompt="once", logprobs=2).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.text_offset) == 3
    assert text.text_offset[:2] == [0, len(text.tokens[0])]
    streamed = list(client.chat.completions.create(**asked, messages=USER, logprobs=True, stream=True))
    entries = [entry for chunk in streamed if (given := chunk.choices[0].logprobs) for entry in given.content]
    assert [entry.logprob for entry in entries] == [entry.logprob for entry in chat.logprobs.content]


def test_without_a_temperature_the_makers_sampling_is_used(client: openai.OpenAI, scorer: ToyScorer) -> None:
    scorer.generator.recommended = Sampling(temperature=0.0)
    with ModelServer(served_models(scorer, [])) as server, client_of(server) as told:
        asked: dict[str, Any] = {"model": "toy", "prompt": "once", "max_tokens": 20, "seed": 3}
        assert told.completions.create(**asked).choices[0].text == greedy("once", 20)
        chosen = told.completions.create(**asked, temperature=1.0).choices[0].text
        assert chosen == client.completions.create(**asked).choices[0].text != greedy("once", 20)  # as OpenAI has it
    recommended = Sampling(0.6, 0.9, 40)
    for given, expected in (
        ({}, Sampling(0.6, 0.9, 40)),
        ({"top_p": 0.5, "seed": 2}, Sampling(0.6, 0.5, 40, 2)),
        ({"top_k": 0}, Sampling(0.6, 0.9, 0)),
        ({"temperature": 0.2}, Sampling(0.2)),
        ({"temperature": 1.0, "top_k": 5}, Sampling(1.0, 1.0, 5)),
    ):
        request = msgspec.convert({"model": "toy", "prompt": "x", **given}, CompletionRequest)
        assert request.settings(recommended).sampling == expected


# --- tuned prompts ---------------------------------------------------------------------------------------------------


def test_a_generating_prompt_replies_as_it_was_tuned(
    client: openai.OpenAI, scorer: ToyScorer, prompts: list[Prompt]
) -> None:
    expected = "".join(p.text for p in SideBySide(ToyScorer(), prompts[1]).generation("question 1", "tuned", None, 5))
    asked: dict[str, Any] = {"model": "toy+manner", "max_tokens": 5, "temperature": 0}
    history = [{"role": "user", "content": "before"}, {"role": "assistant", "content": "so"}, *USER]
    assert client.chat.completions.create(**asked, messages=history).choices[0].message.content == expected
    assert client.completions.create(**asked, prompt="question 1").choices[0].text == expected
    assert (scorer.generator.opened[-1].rows == prompts[1].rows).all()


@pytest.mark.parametrize("kind", ["words", "probe", "prompt", "read"])
def test_the_usage_of_a_classifier_counts_the_tokens_it_read(kind: Kind) -> None:
    prompt = prompt_of_kind(kind, "front")
    short = Task(name=TASK.name, labels=TASK.labels, templates=TASK.templates, max_text_tokens=5)
    with (
        ModelServer(served_models(ToyScorer(), [prompt], {TASK.name: short})) as server,
        client_of(server) as client,
    ):
        counts = {
            client.completions.create(model="toy+toy-mood", prompt=text).usage.prompt_tokens
            for text in ("aaa number 1", "aaa number 1" * 40)
        }
    readout = prompt.layer_readout
    templates = (prompt.template, *(prompt.others if readout is None else readout.others))
    assert len(templates) > 1 or kind == "prompt"
    in_front = prompt.n_prompt if prompt.spec.placement == "front" else 0
    assert counts == {in_front + sum(len(render_ids(ToyScorer(), each, "aaa number", 5)) for each in templates)}


def test_a_classifying_prompt_replies_with_the_label(client: openai.OpenAI, prompts: list[Prompt]) -> None:
    for text, _ in rows(4, 50):
        probabilities = SideBySide(ToyScorer(), prompts[0], TASK).classify(text).tuned
        messages = [{"role": "user", "content": text}]
        asked: dict[str, Any] = {"model": "toy+toy-mood", "messages": messages}
        found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert found.choices[0].message.content == TASK.labels[probabilities.index(max(probabilities))]
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens == 1
        likeliest = {entry.token: entry.logprob for entry in found.choices[0].logprobs.content[0].top_logprobs}
        assert likeliest == pytest.approx(dict(zip(TASK.labels, map(math.log, probabilities), strict=True)))
        streamed = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == found.choices[0].message.content


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}], ids=str
)
@pytest.mark.parametrize("model", ["toy", "toy+manner"])
def test_a_reply_follows_the_response_format(client: openai.OpenAI, wanted: Any, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 8}
    said = client.chat.completions.create(**asked, messages=USER, response_format=wanted).choices[0]
    assert (said.message.content, said.finish_reason) == ("{}", "stop")
    continued = client.completions.create(**asked, prompt="x", extra_body={"response_format": wanted}).choices[0]
    assert continued.text == "{}"
    plain = client.chat.completions.create(**asked, messages=USER, response_format={"type": "text"}).choices[0]
    assert plain.message.content != "{}"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"messages": []}, "messages"),
        ({"n": 2}, "n must be 1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"impossible": 1}}}}, "no grammar"),
        ({"response_format": {"type": "json_object"}, "model": "toy+toy-mood"}, "label"),
        ({"logprobs": True, "top_logprobs": 21}, "20"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": 5}, "`$.messages`"),
        ({"model": "toy+manner", "messages": [{"role": "system", "content": "x"}]}, "toy+manner"),
        ({"model": "toy+manner", "messages": [{"role": "user", "content": " "}]}, "empty"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_chat_is_rejected_in_one_line(
    client: openai.OpenAI, asked: dict[str, Any], named: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "toy", "messages": USER, "stream": stream, **asked})
    assert named in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [300]}, "token id"),
        ({"prompt": [2**40]}, "token id"),
        ({"prompt": "a", "extra_body": {"top_k": 2**40}}, "top_k"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": [5], "model": "toy+manner"}, "token id"),
    ],
)
def test_unsupported_completions_are_rejected(client: openai.OpenAI, asked: dict[str, Any], named: str) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        client.completions.create(**{"model": "toy", **asked})


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b" " * (2**20 + 1), {"content-type": "application/json"}, 413),
        (b"{}", {"content-type": "application/json", "host": "evil.example"}, 421),
    ],
)
def test_invalid_requests_are_rejected_in_openais_form(
    server: ModelServer, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_another_path_is_404_in_openais_form(server: ModelServer) -> None:
    assert httpx.get(f"{server.url}/v1/embeddings").json()["error"]["code"] == "not-found"
    assert httpx.get(f"{server.url}/v1/completions").json()["error"]["code"] == "method-not-allowed"
    assert httpx.get(f"{server.url}/healthz").text == "ok\n"


def test_health_and_help(server: ModelServer) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    help = httpx.get(f"{server.url}/")
    assert (help.status_code, help.headers["content-type"].split(";")[0]) == (200, "text/plain")
    assert f"{server.url}/v1" in help.text
    assert help.text.count("\n") == 1
    assert "toy+toy-mood" in help.text


def test_options_lists_the_allowed_methods(server: ModelServer) -> None:
    for path, methods in (("/v1/completions", {"POST"}), ("/v1/models", {"GET", "HEAD"}), ("/health", {"GET", "HEAD"})):
        answer = httpx.options(f"{server.url}{path}")
        assert answer.status_code == 204
        assert {method.strip() for method in answer.headers["allow"].split(",")} == methods | {"OPTIONS"}
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.options(f"{server.url}/v1/none").status_code == 404


# --- who is answered -------------------------------------------------------------------------------------------------


def test_with_a_token_every_request_must_send_it(scorer: ToyScorer) -> None:
    with ModelServer(served_models(scorer, []), token=TOKEN) as server:
        with client_of(server, TOKEN) as client:
            assert client.models.list().data[0].id == "toy"
        with (
            client_of(server, "wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


@pytest.mark.parametrize("token", [None, TOKEN])
def test_web_pages_of_an_allowed_origin_may_call(scorer: ToyScorer, token: str | None) -> None:
    page, other = {"origin": "https://app.example"}, {"origin": "https://evil.example"}
    with ModelServer(served_models(scorer, []), token=token, origins=["https://app.example"]) as server:
        asked = httpx.options(f"{server.url}/v1/chat/completions", headers=page | PREFLIGHT)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        key = {"authorization": f"Bearer {token}"} if token else {}
        listed = httpx.get(f"{server.url}/v1/models", headers=page | key)
        assert (listed.status_code, listed.headers["access-control-allow-origin"]) == (200, "https://app.example")
        refused = httpx.get(f"{server.url}/v1/models/none", headers=page)
        assert refused.status_code == (401 if token else 404)
        assert refused.headers["access-control-allow-origin"] == "https://app.example"  # its page may read why
        for answer in (
            httpx.options(f"{server.url}/v1/chat/completions", headers=other | PREFLIGHT),
            httpx.get(f"{server.url}/v1/models", headers=other | key),
        ):
            assert "access-control-allow-origin" not in answer.headers
        if token:
            assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://app.example/x", "ftp://x", "null", ""]
)
def test_an_invalid_origin_is_rejected(scorer: ToyScorer, origin: str) -> None:
    with raises(ConfigError, field="--cors"):
        ModelServer(served_models(scorer, []), origins=[origin])


def test_beyond_loopback_it_requires_a_token_and_tls(scorer: ToyScorer) -> None:
    models = served_models(scorer, [])
    with pytest.raises(ConfigError, match="--token-file"):
        ModelServer(models, "0.0.0.0", allow_insecure=True)
    with pytest.raises(ConfigError, match="--cert"):
        ModelServer(models, "0.0.0.0", token=TOKEN)


def test_tls(scorer: ToyScorer, tmp_path: Path) -> None:
    from fedbpt.net.certs import init, issue

    init(tmp_path)
    made = issue(tmp_path, "here", ["127.0.0.1"])
    with ModelServer(served_models(scorer, []), tls=Tls(made.cert, made.key), token=TOKEN) as server:
        context = Tls(ca=tmp_path / "ca.pem").client_context()
        found = httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {TOKEN}"}, verify=context)
        assert found.json()["data"][0]["id"] == "toy"


# --- turns -----------------------------------------------------------------------------------------------------------


def test_a_disconnect_interrupts_the_generation(server: ModelServer, scorer: ToyScorer) -> None:
    for stream in (True, False):
        scorer.generator.pace.clear()
        scorer.generator.cancelled.clear()
        body = json.dumps({"model": "toy", "prompt": "once", "max_tokens": 400, "stream": stream}).encode()
        with socket.create_connection((server.host, server.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            if stream:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
            else:
                while not scorer.generator.opened:
                    time.sleep(0.01)
        assert scorer.generator.cancelled.wait(10)
        scorer.generator.pace.set()
        scorer.generator.opened.clear()


def test_the_next_request_has_its_turn_after_the_one_before(client: openai.OpenAI, scorer: ToyScorer) -> None:
    scorer.generator.pace.clear()
    with client.completions.create(model="toy", prompt="once", max_tokens=400, stream=True, temperature=0):
        pass
    assert scorer.generator.cancelled.wait(10)
    scorer.generator.pace.set()
    found = client.completions.create(model="toy", prompt="once", max_tokens=4, temperature=0)
    assert found.choices[0].text == greedy("once", 4)


def test_many_prompts_have_their_choices_in_order(client: openai.OpenAI, scorer: ToyScorer) -> None:
    texts = [f"text {i}" for i in range(4 * PLACES)]
    asked: dict[str, Any] = {"model": "toy", "prompt": texts, "max_tokens": 2, "temperature": 0}
    expected = [greedy(text, 2) for text in texts]
    assert [choice.text for choice in client.completions.create(**asked).choices] == expected
    said = [""] * len(texts)
    for chunk in client.completions.create(**asked, stream=True):
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == expected
    assert scorer.generator.n_open == 0


@pytest.mark.parametrize("sent", [["a"] * 257, ["a"] * 250_000, [[1]] * 150_000])
def test_too_many_prompts_are_rejected(server: ModelServer, scorer: ToyScorer, sent: list[Any]) -> None:
    body = msgspec.json.encode({"model": "toy", "prompt": sent, "max_tokens": 1})
    answer = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert scorer.generator.opened == []


def test_abandoned_requests_free_their_slots(client: openai.OpenAI, scorer: ToyScorer) -> None:
    for _ in range(2 * PLACES):
        with client.chat.completions.create(model="toy", messages=USER, max_tokens=400, stream=True) as stream:
            next(iter(stream))
    for _ in range(PLACES):
        found = client.completions.create(model="toy", prompt="once", max_tokens=2, temperature=0)
        assert found.choices[0].text == greedy("once", 2)
    while scorer.generator.n_open:  # a server notices that a client left when it is told so
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux drops a peer that takes nothing")
def test_a_client_that_stops_reading_is_disconnected_and_its_work_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "STALLED_S", 1.0)
    ended = Event()

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: " + b"x" * 1000 + b"\n\n"
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def endless(_request: Request) -> StreamingResponse:
        return StreamingResponse(pieces())

    app = Starlette(routes=[Route("/", endless)])
    with HttpServer(app, "127.0.0.1", 0) as server, socket.create_connection((server.host, server.port)) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert ended.wait(60)


def test_a_connection_buffers_little(server: ModelServer) -> None:
    size = server._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert size <= 2 * SEND_BUFFER_BYTES  # the system counts its own part, too


def test_beyond_the_maximum_requests_are_told_when_to_retry(
    client: openai.OpenAI, scorer: ToyScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_REQUESTS", 1)
    asked: dict[str, Any] = {"model": "toy", "prompt": "x", "max_tokens": 3}
    scorer.generator.pace.clear()
    with client.completions.create(**asked, stream=True) as first:
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**asked)
        scorer.generator.pace.set()
        list(first)
    assert caught.value.code == "too-many"
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert client.with_options(max_retries=5).completions.create(**asked).choices  # its place is free again


def test_stopping_the_server_ends_the_completions(scorer: ToyScorer) -> None:
    server = ModelServer(served_models(scorer, []))
    server.start()
    with client_of(server) as client:
        scorer.generator.pace.clear()
        with client.completions.create(model="toy", prompt="once", max_tokens=400, stream=True) as stream:
            server._server.begin_exit()
            assert scorer.generator.cancelled.wait(10)
            scorer.generator.pace.set()
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)
    server.stop()
