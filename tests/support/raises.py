"""`raises`: as `pytest.raises`, held by an error's type and data. Tests do not hold its wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedbpt.errors import FedbptError


@contextmanager
def raises(kind: type[FedbptError], **data: Any) -> Iterator[pytest.ExceptionInfo[FedbptError]]:
    """The block raises an error of exactly ``kind``, in one line, whose attributes are ``data``."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    assert "\n" not in str(error), str(error)
    assert {name: getattr(error, name) for name in data} == data, str(error)
