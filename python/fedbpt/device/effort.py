"""Count a round's evaluations and tokens."""

from __future__ import annotations

from fedbpt.objective.objective import Objective


class Effort:
    """Evaluations and tokens that one round adds to objectives, whose own counters go on from round to round.

    ``with effort.of(objective):`` adds what the block costs.
    """

    def __init__(self) -> None:
        self.evaluations = 0
        self.tokens = 0
        self._objective: Objective | None = None
        self._before = (0, 0)

    def of(self, objective: Objective) -> Effort:
        self._objective = objective
        self._before = (objective.evaluations, objective.tokens)
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._objective is not None:
            self.evaluations += self._objective.evaluations - self._before[0]
            self.tokens += self._objective.tokens - self._before[1]
