"""What the coordinator knows about each type of `Work`: one file a type, registered here in `KINDS`."""

from __future__ import annotations

from typing import Any, Final

from fedbpt.coordinator.work_kinds.base import WorkKind
from fedbpt.coordinator.work_kinds.layer_fit import LayerCross, LayerSketches, LayerSums
from fedbpt.coordinator.work_kinds.local import Local
from fedbpt.coordinator.work_kinds.logistic_fit import StateLogistic, StateMoments
from fedbpt.coordinator.work_kinds.means_fit import PrivateMeans, PublicTexts
from fedbpt.coordinator.work_kinds.pooled import Pooled
from fedbpt.coordinator.work_kinds.readout_fit import ReadoutFit
from fedbpt.coordinator.work_kinds.secure import Keys, Shares, Unmask
from fedbpt.coordinator.work_kinds.selection import Selection
from fedbpt.protocol.rounds import Result, Work

KINDS: Final[tuple[WorkKind[Any, Any], ...]] = (
    Selection(),
    Pooled(),
    Local(),
    ReadoutFit(),
    LayerSums(),
    LayerCross(),
    StateMoments(),
    StateLogistic(),
    LayerSketches(),
    PublicTexts(),
    PrivateMeans(),
    Keys(),
    Shares(),
    Unmask(),
)
"""All but `ReplayWork` and `RanksResult`: short forms, which transports expand."""

_BY_WORK: Final = {kind.work: kind for kind in KINDS}
_BY_RESULT: Final = {kind.result: kind for kind in KINDS}


def kind_of(work: Work) -> WorkKind[Any, Any]:
    """The kind of ``work``; raises `LookupError` for a short form."""
    return _BY_WORK[type(work)]


def kind_of_result(result: Result) -> WorkKind[Any, Any]:
    """The kind of the work that ``result`` answers; raises `LookupError` for a short form."""
    return _BY_RESULT[type(result)]


__all__ = ["KINDS", "WorkKind", "kind_of", "kind_of_result"]
