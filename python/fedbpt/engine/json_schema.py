"""`check_schema`: which JSON schemas a grammar can hold.

llama.cpp's conversion ignores keywords that it does not know, and takes a long time, or for ever, for some schemas. So
only what a grammar holds exactly is let through, within limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from fedbpt.errors import InputError

MAX_BYTES: Final = 2**14
"""Maximum size of a schema, as JSON in UTF-8."""

MAX_DEPTH: Final = 32
"""Maximum nesting of a schema, and of references to references."""

MAX_PROPERTIES: Final = 64
"""Maximum number of properties of an object: the conversion takes time with their third power."""

MAX_NAME: Final = 128
"""Maximum length of a name."""

MAX_REPEATS: Final = 1000
"""Maximum of ``maxItems``, ``minLength`` and so on."""

_NOTES: Final = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"})
_ANY: Final = frozenset({"type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions"}) | _NOTES
_OF_TYPE: Final[Mapping[str, frozenset[str]]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_FORMATS: Final = frozenset({"date", "time", "date-time", "uuid"})
_COUNTS: Final = ("minItems", "maxItems", "minLength", "maxLength")
_BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def check_schema(schema: str) -> None:
    """Raise `InputError` unless ``schema``, JSON, is a JSON schema that a grammar can hold."""
    if len(schema.encode(errors="replace")) > MAX_BYTES:
        raise InputError(f"the schema has more than {MAX_BYTES:,} bytes: use a shorter one", field="schema")
    try:
        root = json.loads(schema, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError("the schema is not JSON: correct it", field="schema") from error
    _Check(root).run()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class _Check:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._followed: set[str] = set()  # references that lead to an end

    def run(self) -> None:
        self._check(self._root, 0)
        self._check_references(self._root, [])

    def _check(self, schema: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _refused(f"it is nested more than {MAX_DEPTH} levels")
        if isinstance(schema, bool) and schema:
            return
        if not isinstance(schema, dict):
            raise _refused("a part of it is no object")
        parts = list(_parts(schema))
        self._check_keywords(schema)
        self._check_numbers(schema)
        for inner in parts:
            self._check(inner, depth + 1)

    def _check_keywords(self, schema: dict[str, Any]) -> None:
        types = _types(schema)
        known = _ANY.union(*(_OF_TYPE[name] for name in types or _guessed(schema)))
        unknown = [name for name in schema if name not in known]
        if unknown:
            raise _refused(f"a grammar does not hold {unknown[0][:MAX_NAME]!r} here")
        alone = [name for name in ("$ref", "enum", "const", "anyOf", "oneOf") if name in schema]
        others = set(schema) - _NOTES - {"$defs", "definitions", "type", *alone[:1]}
        if alone and (others or (alone[0] != "enum" and alone[0] != "const" and "type" in schema)):
            raise _refused(f"{alone[0]!r} stands beside other keywords")
        if "format" in schema and (str(schema["format"]) not in _FORMATS or set(schema) & {"minLength", "maxLength"}):
            raise _refused(f"format must be one of {', '.join(sorted(_FORMATS))}, without a length")
        properties = schema.get("properties", {})
        if len(properties) > MAX_PROPERTIES:
            raise _refused(f"an object has more than {MAX_PROPERTIES} properties")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(each, str) and each in properties for each in required):
            raise _refused("required must name properties")
        names = [*properties, *schema.get("$defs", {}), *schema.get("definitions", {})]
        if any(len(name) > MAX_NAME for name in names):
            raise _refused(f"a name has more than {MAX_NAME} characters")

    def _check_numbers(self, schema: dict[str, Any]) -> None:
        for name in _COUNTS:
            count = schema.get(name, 0)
            if type(count) is not int or not 0 <= count <= MAX_REPEATS:
                raise _refused(f"{name} must be from 0 to {MAX_REPEATS}")
        for name in _BOUNDS:
            bound = schema.get(name, 0)
            if type(bound) is not int or not -(2**53) <= bound <= 2**53:
                raise _refused(f"{name} must be an integer of at most 2^53")

    def _check_references(self, schema: Any, chain: list[str]) -> None:
        """References must exist, and not lead back to themselves without an object or an array in between."""
        if isinstance(schema, bool):
            return
        for name in ("anyOf", "oneOf"):
            for inner in schema.get(name, ()):
                self._check_references(inner, chain)
        if "$ref" in schema:
            name = schema["$ref"]
            if name in chain or len(chain) >= MAX_DEPTH:
                raise _refused(f"the reference {str(name)[:MAX_NAME]!r} leads back to itself, or on too often")
            target = self._target(name)
            if name not in self._followed:
                self._check_references(target, [*chain, name])
                self._followed.add(name)
        if not chain:
            for inner in _parts(schema, alternatives=False):
                self._check_references(inner, [])

    def _target(self, name: Any) -> Any:
        if name == "#":
            return self._root
        parts = name.split("/") if isinstance(name, str) and len(name) <= 2 * MAX_NAME else []
        found = self._root.get(parts[1], {}) if len(parts) == 3 and parts[0] == "#" else {}
        if len(parts) != 3 or parts[1] not in ("$defs", "definitions") or parts[2] not in found:
            raise _refused(f"there is no reference {str(name)[:MAX_NAME]!r}, only '#' and '#/$defs/NAME'")
        return found[parts[2]]


def _types(schema: dict[str, Any]) -> list[str]:
    given = schema.get("type", [])
    types = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) and name in _OF_TYPE for name in types) or len(set(types)) < len(types):
        raise _refused(f"type must be one of {', '.join(_OF_TYPE)}, or a list of different ones")
    return types


def _guessed(schema: dict[str, Any]) -> Iterator[str]:
    """The type of a schema that names none: by its keywords."""
    for name, keywords in _OF_TYPE.items():
        if keywords & set(schema):
            yield name
            return


def _parts(schema: dict[str, Any], alternatives: bool = True) -> Iterator[Any]:
    for name in ("properties", "$defs", "definitions"):
        found = schema.get(name, {})
        if not isinstance(found, dict):
            raise _refused(f"{name} must be an object")
        yield from found.values()
    for name in ("items", "additionalProperties"):
        if name in schema and not (name == "additionalProperties" and schema[name] is False):
            yield schema[name]
    for name in ("anyOf", "oneOf") if alternatives else ():
        found = schema.get(name, [])
        if not isinstance(found, list) or (name in schema and not found):
            raise _refused(f"{name} must be a list of schemas")
        yield from found


def _refused(why: str) -> InputError:
    return InputError(f"the JSON schema has no grammar ({why}): use a simpler one", field="schema")
