"""The order of the tests: files with slow ones first, so that no process is left with one of them at the end."""

from __future__ import annotations

import os

import pytest

from tests.support.sockets import watch_sockets

watch_sockets()
os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a process of a test that crashes says where


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
