"""How reports become the next round: one algorithm a file."""

from __future__ import annotations

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled

__all__ = ["Aggregator", "FedAvg", "FedBPT", "Pooled"]
