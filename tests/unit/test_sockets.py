"""A socket that a test leaves open is told with the place that opened it."""

from __future__ import annotations

import gc
import socket
import sys

import pytest


class Kept(socket.socket):
    """A socket that only the garbage collector ends."""

    def __init__(self) -> None:
        super().__init__()
        self.itself = self


def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the collection of garbage warns of."""
    found: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: found.append(str(args.exc_value)))
    gc.collect()
    return found


def open_one() -> None:
    Kept()


def test_an_unclosed_socket_is_told_with_the_place_that_opened_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    open_one()
    [warning] = told(monkeypatch)
    assert "unclosed <" in warning
    assert "in open_one" in warning


def test_a_closed_socket_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    Kept().close()
    assert told(monkeypatch) == []
