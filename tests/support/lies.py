"""Messages of a device with one number changed, and a device that sends them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from fedbpt.device.agent import LocalDevice
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, EvaluateRequest, RoundPlan, RoundReport
from fedbpt.protocol.specs import Array, Message

M = TypeVar("M", bound=Message)

Path = tuple[str | int, ...]

EXTREMES: Final[tuple[int | float, ...]] = (
    *(0, 1, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, -(2**63)),
    *(0.0, -1.0, 5e-324, 1e-30, 0.99, 9e3, 1e5, 9.9e8, 1e12, 1.7e308, -9e3, -1.7e308, float("nan"), float("inf")),
)


def leaves(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of the numbers in a message; an array counts as one number."""
    if isinstance(value, Array) or (isinstance(value, int | float) and not isinstance(value, bool)):
        if path[-1] != "protocol":
            yield path
    elif isinstance(value, msgspec.Struct):
        for field in value.__struct_fields__:
            yield from leaves(getattr(value, field), (*path, field))
    elif isinstance(value, tuple):
        for index, item in enumerate(value[:1]):
            yield from leaves(item, (*path, index))


def changed(value: Any, path: Path, to: float) -> Any:
    """``value`` with the number at ``path`` replaced; in an array, all its elements. An int remains an int."""
    if not path:
        if isinstance(value, Array):
            with np.errstate(over="ignore"):
                return Array.of(np.full(value.shape, float(to)))
        if isinstance(value, int):
            return int(to) if math.isfinite(to) else to
        return float(to)
    first, *rest = path
    if isinstance(value, tuple):
        assert isinstance(first, int)
        return (*value[:first], changed(value[first], tuple(rest), to), *value[first + 1 :])
    assert isinstance(first, str)
    return msgspec.structs.replace(value, **{first: changed(getattr(value, first), tuple(rest), to)})


def largest(value: Any, path: Path) -> float:
    """The largest absolute value at ``path``."""
    for part in path:
        value = value[part] if isinstance(part, int) else getattr(value, part)
    return float(np.abs(value.numpy()).max()) if isinstance(value, Array) else abs(value)


class Liar:
    """Wraps ``device`` and applies ``lie`` to each of its messages."""

    def __init__(self, device: LocalDevice, lie: Callable[[Any], Any]) -> None:
        self.device = device
        self.lie = lie
        self.name = device.name

    def info(self) -> DeviceInfo:
        found: DeviceInfo = self.lie(self.device.info())
        return found

    def run(self, plan: RoundPlan, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> RoundReport:
        found: RoundReport = self.lie(self.device.run(plan, progress, cancelled))
        return found

    def evaluate(
        self, request: EvaluateRequest, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> EvaluateReport:
        found: EvaluateReport = self.lie(self.device.evaluate(request, progress, cancelled))
        return found

    def answer(self, question: Question, said: Callable[[Answer], None], cancelled: Callable[[], bool]) -> Answer:
        return self.device.answer(question, said, cancelled)
