"""`Course`: the progress of a run, and the time that is left. Counts live and stored runs alike."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from fedbpt.coordinator.costs.estimate import readout_tokens, spent_share
from fedbpt.coordinator.costs.spending import Spending
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.protocol.specs import Template
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.settings import RunSettings

RECENT: Final = 10
"""Last rounds of the search that give the pace."""


class _Round(NamedTuple):
    seconds: float
    evaluations: float
    tokens: float


class Course:
    """Counts closed rounds. ``spending``: of the run; updated by the caller."""

    def __init__(self, spending: Spending) -> None:
        self._spending = spending
        self._recent: deque[_Round] = deque(maxlen=RECENT)
        self._seconds: defaultdict[RoundPurpose, float] = defaultdict(float)
        self._live: dict[int, float] = {}  # seconds of the evaluations on dev rows, by `searched`
        self.searched = 0
        self.evaluations = 0

    def closed(self, purpose: RoundPurpose, seconds: float, evaluations: int, tokens: int) -> None:
        """Count a closed round. ``evaluations``: of the search; ``tokens``: of all devices."""
        self._seconds[purpose] += seconds
        if purpose == "search":
            self.searched += 1
            self.evaluations += evaluations
            self._recent.append(_Round(seconds, evaluations, tokens))
            self._seconds["readout"] = 0.0  # it will be fitted again

    def evaluated(self, searched: int, seconds: float) -> None:
        """Count an evaluation on dev rows, with the fit of its readout, after ``searched`` rounds of the search."""
        self._live[searched] = seconds

    def share(self, limits: RunSettings) -> float:
        """Share of the budget that is spent, 0 to 1, by the limit that is nearest."""
        spent = self._spending
        return spent_share(limits, self.searched, self.evaluations, spent.charged_tokens, spent.charged_seconds)

    def seconds_left(
        self, limits: RunSettings, templates: Sequence[Template], infos: Sequence[DeviceInfo]
    ) -> float | None:
        """Seconds until the run's result; None: unknown yet.

        For a budget in seconds, by the clock: calibration and readout are charged to it. Otherwise at the pace of the
        last rounds, plus the evaluations to come and the readout. With several limits, by the first. The evaluation of
        the result is added. ``templates``: of the task; empty: unknown, and the readout's cost with them.
        """
        readout_s = self._readout_s(limits, templates, infos)
        evaluation_s = self._last_s if len(self._live) > 1 else self._first_s + readout_s
        ends = []
        if self._seconds["readout"]:
            ends.append(max(readout_s - self._seconds["readout"], 0.0))
        elif (rounds := self._rounds_left(limits)) is not None:
            between_s = self._n_evaluations(limits, rounds) * evaluation_s
            ends.append(rounds * self._pace.seconds + between_s + readout_s)
        if limits.seconds:
            left = max(self._spending.seconds_left(limits.seconds), 0.0)
            pace = self._pace.seconds
            between_s = self._n_evaluations(limits, left / pace) * evaluation_s if pace else 0.0
            ends.append(left + between_s)  # evaluations are not charged
        return min(ends) + self._final_s(limits, infos) if ends else None

    @property
    def _pace(self) -> _Round:
        """Mean of the last rounds."""
        n = max(len(self._recent), 1)
        return _Round(*(sum(each[i] for each in self._recent) / n for i in range(3)))

    def _rounds_left(self, limits: RunSettings) -> float | None:
        """Rounds until a limit that is a count; None: there is none, or no pace yet."""
        pace = self._pace
        spent = self._spending
        left = [
            max(limit - done, 0) / each
            for limit, done, each in (
                (limits.rounds, self.searched, float(bool(self._recent))),
                (limits.evaluations, self.evaluations, pace.evaluations),
                (limits.tokens, spent.charged_tokens, pace.tokens),
            )
            if limit and each
        ]
        return min(left, default=None)

    def _n_evaluations(self, limits: RunSettings, rounds: float) -> int:
        """Number of evaluations on dev rows in the next ``rounds``; the last mean's is part of the end."""
        every = limits.evaluate_every
        if not (every and self._live):
            return 0
        return max((self.searched + int(rounds) - 1) // every - self.searched // every, 0)

    @property
    def _first_s(self) -> float:
        """Seconds of the first evaluation on dev rows, which reads them and fits nothing; 0: there was none."""
        return self._live[min(self._live)] if self._live else 0.0

    @property
    def _last_s(self) -> float:
        return self._live[max(self._live)] if self._live else 0.0

    def _readout_s(self, limits: RunSettings, templates: Sequence[Template], infos: Sequence[DeviceInfo]) -> float:
        """Seconds of the readout's fit, at the pace in tokens; at most those of an evaluation, which includes a fit."""
        rate = self._spending.tokens_per_second(max(len(infos), 1))
        if not (rate and templates):
            return 0.0
        tokens = readout_tokens(limits, templates, infos, self._spending.tokens_for["calibration"])
        return min(tokens / rate, self._last_s if len(self._live) > 1 else math.inf)

    def _final_s(self, limits: RunSettings, infos: Sequence[DeviceInfo]) -> float:
        """Seconds of evaluating the last mean on dev rows, and the result on test rows, which are read then."""
        dev, test = (
            max((min(rows, most or rows) for rows in counts), default=0)
            for counts, most in (
                ([info.n_dev for info in infos], limits.dev_rows),
                ([info.n_test for info in infos], limits.test_rows),
            )
        )
        return self._last_s + self._first_s * test / dev if dev else 0.0
