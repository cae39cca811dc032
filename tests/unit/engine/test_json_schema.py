"""Which JSON schemas are let through to llama.cpp's conversion: it ends the process, or never ends, for some others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedbpt.engine.json_schema import MAX_DEPTH, check_schema
from fedbpt.errors import InputError

TEXT = {"type": "string"}
PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"anyOf": [{"type": "integer", "minimum": 0, "exclusiveMaximum": 150}, {"type": "null"}]},
        "born": {"type": "string", "format": "date"},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
        "kind": {"enum": ["a", 1, None]},
        "more": {"type": ["string", "null"], "description": "anything"},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": TEXT}},
}


@pytest.mark.parametrize("schema", [{}, True, {"type": "object"}, {"const": 3}, TEXT, PERSON], ids=str)
def test_usual_schemas_are_let_through(schema: Any) -> None:
    check_schema(json.dumps(schema))


def chain(n: int) -> dict[str, Any]:
    refs = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**refs, f"d{n}": TEXT}}


def nested(n: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        3,
        [],
        False,
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [TEXT, {"$ref": "#/$defs/a"}]}}},
        {"$ref": "http://example.invalid/x"},
        {"$ref": "#/$defs/none"},
        {"$ref": 3},
        {"$defs": [1]},
        chain(MAX_DEPTH + 1),
        nested(MAX_DEPTH + 1),
        {"type": ["object"] * 12},
        {"type": "no-such"},
        {"type": 3},
        {"type": "object", "properties": {"_" * 300: {}}},
        {"type": "object", "properties": {str(i): {} for i in range(100)}},
        {"type": "object", "properties": [1]},
        {"type": "object", "required": ["none"]},
        {"type": "object", "required": [[]]},
        {"type": "object", "patternProperties": {"a": {}}},
        {"type": "object", "minProperties": 2},
        {"type": "array", "maxItems": 10**9},
        {"type": "array", "uniqueItems": True},
        {"type": "array", "items": [TEXT]},
        {"type": "string", "minLength": 3000},
        {"type": "string", "pattern": "^.{6}$"},
        {"type": "string", "format": "email"},
        {"type": "string", "format": ["date"]},
        {"type": "integer", "minimum": 1e300},
        {"type": "integer", "minimum": 0.5},
        {"type": "number", "minimum": 0},
        {"type": "number", "multipleOf": 2},
        {"type": "string", "enum": ["a"], "maxLength": 3},
        {"anyOf": []},
        {"anyOf": [TEXT], "type": "string"},
        {"not": TEXT},
        {"enum": ["x" * 20_000]},
    ],
    ids=lambda schema: str(schema)[:60],
)
def test_what_a_grammar_does_not_hold_is_refused_in_one_line(schema: Any) -> None:
    with pytest.raises(InputError) as caught:
        check_schema(json.dumps(schema))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["", "{", '{"const": NaN}', "[" * 10_000, '{"a"' * 100])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        check_schema(text)


def test_many_ways_to_a_reference_take_no_time() -> None:
    twice = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(MAX_DEPTH - 2)}
    check_schema(json.dumps({"$ref": "#/$defs/d0", "$defs": {**twice, f"d{MAX_DEPTH - 2}": TEXT}}))
