"""The exchanges of secure aggregation, which score nothing: keys, shares of secrets, and shares that are revealed."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from fedbpt.coordinator.work_kinds.base import WorkKind
from fedbpt.errors import WireError
from fedbpt.protocol.rounds import (
    KeysResult,
    KeysWork,
    RoundPlan,
    RoundReport,
    SharesResult,
    SharesWork,
    UnmaskResult,
    UnmaskWork,
)
from fedbpt.secure.shamir import SECRET_BYTES, SHARE_BYTES
from fedbpt.secure.sizes import SEALED_BYTES


class ScoresNothing(WorkKind):  # type: ignore[type-arg]  # of one of these works
    """Devices send keys or shares; `check_answer` checks their sizes."""

    @abstractmethod
    def check_answer(self, result: Any, work: Any, device: str) -> None:
        """Raise `WireError` unless ``result``, of ``device``, has the sizes that ``work`` asks for."""

    def check_result(self, report: RoundReport, result: Any, plan: RoundPlan, work: Any, n_rows: int | None) -> None:
        del report, n_rows  # nothing is computed from rows
        self.check_answer(result, work, plan.device)

    def max_evaluations(self, plan: RoundPlan, work: Any) -> int:  # noqa: ARG002
        return 0

    def max_texts(self, plan: RoundPlan, work: Any, n_texts: int) -> int:  # noqa: ARG002
        return 0

    def mean_loss(self, result: Any, n_texts: int) -> float:  # noqa: ARG002
        return 0.0


class Keys(ScoresNothing):
    work = KeysWork
    result = KeysResult

    def check_answer(self, result: KeysResult, work: KeysWork, device: str) -> None:
        from fedbpt.secure.party import check_keys  # here: it needs the extra

        check_keys(work.epoch, device, result, work.n_uses)


class Shares(ScoresNothing):
    work = SharesWork
    result = SharesResult

    def check_answer(self, result: SharesResult, work: SharesWork, device: str) -> None:  # noqa: ARG002
        n_uses = len(work.keys[0].mask_keys) // SECRET_BYTES
        expected = [SEALED_BYTES * n_uses] * len(work.names)
        if [len(each) for each in result.sealed] != expected:
            raise WireError(f"sealed must have {len(work.names)} entries of {expected[0]} bytes", field="sealed")


class Unmask(ScoresNothing):
    work = UnmaskWork
    result = UnmaskResult

    def check_answer(self, result: UnmaskResult, work: UnmaskWork, device: str) -> None:  # noqa: ARG002
        if [len(share) for share in result.shares] != [SHARE_BYTES] * len(work.sealed):
            raise WireError(f"shares must be {len(work.sealed)} of {SHARE_BYTES} bytes", field="shares")
