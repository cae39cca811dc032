"""Texts that follow a grammar: JSON of a schema, on a real model, and what cannot be followed."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from tests.support.raises import raises

import fedbpt
from fedbpt.engine.text_generator import Generator, Placed, Sampling
from fedbpt.engine.text_stream import Generation
from fedbpt.errors import InputError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "food": {"enum": ["Italian", "Frühstück", None]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["name", "food", "stars"],
    "additionalProperties": False,
}
LIST = {
    "type": "array",
    "items": {"$ref": "#/$defs/n"},
    "minItems": 2,
    "maxItems": 2,
    "$defs": {"n": {"type": "boolean"}},
}
NOTHING = Sampling(grammar="root ::= [5-1]")
TEXTS = ["The Mill is a pub with five stars.\nJSON:", "{", "", "日本 🎉"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    fedbpt.models.pull("smollm2-135m")
    return fedbpt.load_model("smollm2-135m").generator


def said(generator: Generator, text: str, sampling: Sampling, n: int = 150) -> tuple[str, str | None]:
    ids = generator.text_ids(text)
    start = Placed(ids if len(ids) else np.array([1], dtype=np.int32))
    with Generation(generator, start, sampling, n) as generation:
        return "".join(piece.text for piece in generation), generation.finish_reason


@pytest.mark.parametrize("schema", [SCHEMA, LIST], ids=["object", "list"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.8, "seed": 1}, {"temperature": 1.0, "top_k": 5, "seed": 2}], ids=str
)
def test_json_is_what_the_schema_allows(
    generator: Generator, schema: dict[str, Any], text: str, how: dict[str, Any]
) -> None:
    grammar = generator.json_grammar(json.dumps(schema))
    found, finished = said(generator, text, Sampling(**how, grammar=grammar))
    if finished == "stop":  # else white space filled the space there was
        jsonschema.validate(json.loads(found), schema)
    assert finished == "stop" or how


def test_a_grammar_of_any_text_changes_nothing(generator: Generator) -> None:
    plain = said(generator, TEXTS[0], Sampling(), 20)
    assert said(generator, TEXTS[0], Sampling(grammar="root ::= [^\\x00]*"), 20) == plain


def test_log_probabilities_are_the_models_own(generator: Generator) -> None:
    grammar = generator.json_grammar('{"enum": [true]}')
    ids = generator.text_ids(TEXTS[0])
    free = generator.open(Placed(ids), Sampling()).next(generator.n_ctx)
    bound = generator.open(Placed(ids), Sampling(grammar=grammar)).next()
    assert bound.id != free.id
    assert abs(dict(free.likeliest)[bound.id] - bound.log_prob) < 0.05


def test_a_schema_without_a_grammar_is_refused(generator: Generator) -> None:
    with raises(InputError, field="schema"):
        generator.json_grammar('{"type": "string", "pattern": "(?=a)b"}')


def test_a_text_that_no_token_continues_can_be_asked_again(generator: Generator) -> None:
    streams = [generator.open(Placed(generator.text_ids(TEXTS[0])), how) for how in (Sampling(), NOTHING)]
    for _ in range(3):
        token, error = generator.next_all(streams, [0, 0])
        assert not isinstance(token, Exception)
        assert isinstance(error, InputError)
        with pytest.raises(InputError, match="no token"):
            streams[1].next()
    for stream in streams:
        stream.close()


def test_control_tokens_are_no_characters_of_a_string(generator: Generator) -> None:
    control = 1  # <|im_start|>
    assert generator.piece(control) == b""
    ids = generator.text_ids(TEXTS[0])
    grammar = 'root ::= "<|im_start|>"'
    found, _ = said(generator, TEXTS[0], Sampling(grammar=grammar), 20)
    assert found == "<|im_start|>"
    with pytest.raises(InputError, match="does not follow"):
        generator.open(Placed(np.append(ids, np.int32(control)), n_said=1), Sampling(grammar=grammar))


def test_what_is_no_grammar_is_refused_and_the_generator_goes_on(
    generator: Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    before = said(generator, TEXTS[0], Sampling(), 5)
    for grammar in ("root ::= missing", "other ::= 'a'", "\0", "root ::= " + "(" * 50):
        with pytest.raises(InputError) as caught:
            said(generator, TEXTS[0], Sampling(grammar=grammar), 5)
        assert "\n" not in str(caught.value)
    for schema in ("", "{", "[1]", "3", '{"type": ' * 30):
        with pytest.raises(InputError):
            generator.json_grammar(schema)
    assert capfd.readouterr() == ("", "")
    assert said(generator, TEXTS[0], Sampling(), 5) == before


def test_many_texts_at_a_time_have_no_grammar() -> None:
    scorer = fedbpt.load_model("smollm2-135m")
    plan = scorer.compile([scorer.tokenize("a")], None)
    with raises(InputError, field="grammar"):
        plan.generate(np.zeros((1, 0, scorer.n_embd), np.float32), None, Sampling(grammar="root ::= 'a'"))
