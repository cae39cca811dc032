from __future__ import annotations

import pytest

from fedbpt.net import rate_limit
from fedbpt.net.rate_limit import RateLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    clock = Clock()
    limit = RateLimit(2.0, 3, clock)
    assert [limit.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    clock.now = 0.5
    assert limit.take("a") == 0.0
    assert limit.take("a") == 0.5


def test_who_waits_gets_no_more_than_a_burst() -> None:
    clock = Clock()
    limit = RateLimit(2.0, 3, clock)
    limit.take("a")
    clock.now = 1e6
    assert [bool(limit.take("a")) for _ in range(4)] == [False, False, False, True]


def test_keys_do_not_share() -> None:
    limit = RateLimit(1.0, 1, Clock())
    assert limit.take("a") == 0.0
    assert limit.take("b") == 0.0
    assert limit.take("a") > 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_KEYS", 2)
    limit = RateLimit(1.0, 1, Clock())
    for key in ("a", "b", "c"):
        assert limit.take(key) == 0.0
    assert limit.take("c") > 0
    assert limit.take("a") == 0.0  # forgotten
