"""`PrivacyLimit`: a device's own limit of the ε that its training rows are spent on, whatever coordinators ask."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from fedbpt.device.state import DeviceState
from fedbpt.errors import InputError
from fedbpt.objective.privacy import Released, require_accountant, sampling_rate, total_epsilon
from fedbpt.protocol.rounds import (
    EvaluateRequest,
    LocalWork,
    MeansWork,
    PooledWork,
    PublicWork,
    RoundPlan,
    SecureWork,
    SelectWork,
)
from fedbpt.secure.sizes import threshold_of

DELTA: Final = 1e-5
"""The δ at which the limit holds."""


class PrivacyLimit:
    """Counts what a device has sent in all runs, in its state. A repeated plan, with the same result, is free.

    A secure sum that is tried again is another plan, with other noise, and counts again.

    Args:
        epsilon: most ε at `DELTA`; a plan beyond it is refused, and so is every plan without noise. None: only counts.
        n_rows: the device's training rows.
        state: keeps what was sent.
        knows_peers: the device accepts only peers of secure aggregation whose identities its owner has pinned. A masked
            sum then counts with the noise of all of them; else with this device's part, as the others may be invented.

    Raises `MissingExtraError` without the accountant's library.
    """

    def __init__(self, epsilon: float | None, n_rows: int, state: DeviceState, knows_peers: bool = False) -> None:
        if epsilon is not None:
            require_accountant()
        self._most = epsilon
        self._n_rows = n_rows
        self._knows_peers = knows_peers
        self._state = state

    @property
    def spent(self) -> float:
        """ε so far."""
        return self._with(None)

    def check(self, plan: RoundPlan, question: str) -> None:
        """Raise `InputError` if ``plan`` would exceed the limit; ``question`` knows it again. Counts nothing."""
        if self._most is None:
            return
        asked = self._released(plan)
        if asked is None or self._is_known(asked, question):
            return
        found = self._with(asked)
        if found > self._most:
            again = ""
            if plan.secure and plan.run in self._state.summed:
                again = "; a secure sum is tried again, with other noise, which costs as much as the first try"
            raise InputError(
                f"this work would bring the ε of this device's rows to {found:.2f}, beyond its --max-epsilon "
                f"{self._most:g} (now {self.spent:.2f}{again}): use more noise or fewer rounds, or start the device "
                "with more",
                field="privacy",
                limit=self._most,
            )

    def record(self, plan: RoundPlan, question: str) -> None:
        """Count the noisy result of ``plan``, which is about to be sent."""
        sent = self._released(plan)
        if sent is None:
            return
        if not self._is_known(sent, question):
            self._state.spent[question] = sent
        if plan.secure:
            self._state.summed.add(plan.run)

    def check_evaluation(self, request: EvaluateRequest) -> None:
        """Raise `InputError` for an exact evaluation of training rows."""
        if self._most is not None and request.split == "held":
            raise InputError(
                "this device's training rows are only used with noise (--max-epsilon), expected the dev or test split",
                field="split",
            )

    def _is_known(self, asked: Released, question: str) -> bool:
        """Whether the same result was counted: with no more noise, as peers may have been trusted then."""
        known = self._state.spent.get(question)
        return known is not None and known.noise <= asked.noise

    def _released(self, plan: RoundPlan) -> Released | None:
        """What a plan makes the device send; None: nothing of its rows."""
        work, spec = plan.work, plan.privacy
        if isinstance(work, PublicWork | SecureWork):
            return None
        if spec is None:
            raise InputError(
                "this device's rows are only used with noise (--max-epsilon): set [settings.privacy] in the run",
                field="privacy",
            )
        if isinstance(work, MeansWork):
            parts = threshold_of(len(plan.secure.peers)) if plan.secure and not self._knows_peers else 1
            return Released(spec.noise_of_readout / math.sqrt(parts), 1.0, 1)
        if isinstance(work, SelectWork):
            return Released(spec.noise_multiplier, sampling_rate(self._n_rows, work.max_rows), 1)
        rate = sampling_rate(self._n_rows, plan.objective.batch_size)
        if isinstance(work, LocalWork):
            return Released(spec.noise_multiplier, rate, work.iterations)
        if isinstance(work, PooledWork):
            return Released(spec.noise_multiplier, rate, 1)
        raise InputError("expected work that has its noise, or a whole plan", field="privacy")

    def _with(self, more: Released | None) -> float:
        totals: Counter[tuple[float, float]] = Counter()
        for sent in [*self._state.spent.values(), *([] if more is None else [more])]:
            totals[sent.noise, sent.rate] += sent.times
        return total_epsilon([Released(*key, times) for key, times in totals.items()], DELTA)
