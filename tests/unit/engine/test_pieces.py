"""Text pieces: whole characters, nothing of a stop string, and nothing lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt.engine.pieces import TextPieces


def said(data: list[bytes], *stop: str) -> list[str]:
    pieces = TextPieces(stop)
    return [*(pieces.add(part) for part in data), pieces.end()]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), cuts=st.lists(st.integers(0, 40)))
def test_any_cut_of_a_text_gives_the_text_in_whole_characters(text: str, cuts: list[int]) -> None:
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [data[a:b] for a, b in pairwise(places)]
    assert "".join(said(parts)) == text


def test_a_character_comes_when_its_last_byte_does() -> None:
    euro = "€".encode()
    assert said([b"a" + euro[:1], euro[1:2], euro[2:] + b"b"]) == ["a", "", "€b", ""]


def test_an_incomplete_character_at_the_end_is_dropped() -> None:
    assert said([b"a", "€".encode()[:2]]) == ["a", "", ""]


def test_invalid_utf_8_becomes_replacement_characters() -> None:
    assert "".join(said([b"a\xffb"])) == "a\ufffdb"


@pytest.mark.parametrize(
    ("parts", "stop", "expected"),
    [
        (["one\n", "two"], ["\n"], "one"),
        (["one#", "#", "two"], ["##"], "one"),
        (["one#", "two"], ["##"], "one#two"),
        (["a", "b", "a", "b", "c"], ["abc"], "ab"),
        (["end of", " text"], ["text", "of"], "end "),
        (["one#"], ["##"], "one#"),
        (["one"], [""], "one"),
        (["€", "€uro"], ["€u"], "€"),
    ],
)
def test_the_stop_string_and_what_follows_are_dropped(parts: list[str], stop: list[str], expected: str) -> None:
    assert "".join(said([part.encode() for part in parts], *stop)) == expected


@settings(deadline=None)
@given(text=st.text("ab#"), stop=st.lists(st.text("ab#", min_size=1, max_size=3), max_size=3), size=st.integers(1, 4))
def test_however_a_text_is_cut_it_ends_before_a_stop_string(text: str, stop: list[str], size: int) -> None:
    parts = [text[i : i + size].encode() for i in range(0, len(text), size)]
    whole = "".join(said(parts, *stop))
    assert not [string for string in stop if string in whole]
    rest = text[len(whole) :]
    assert text.startswith(whole)
    assert not rest or [string for string in stop if rest.startswith(string)]


def test_stopped_is_set_after_a_stop_string() -> None:
    pieces = TextPieces(["."])
    pieces.add(b"a")
    assert not pieces.stopped
    pieces.add(b"b.c")
    assert pieces.stopped
    assert pieces.add(b"d") + pieces.end() == ""
