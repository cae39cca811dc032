"""How reports become the next round: one algorithm a file."""

from __future__ import annotations

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled
from fedbpt.errors import ConfigError
from fedbpt.messages import PromptSpec

__all__ = ["Aggregator", "FedAvg", "FedBPT", "Pooled", "make_aggregator"]


def make_aggregator(method: str, prompt: PromptSpec, popsize: int, iterations: int, seed: int) -> Aggregator:
    """The aggregator of a run's settings, before its first round.

    Args:
        method: ``pooled``, ``fedbpt`` or ``fedavg``.
        prompt: its d and σ0.
        popsize: λ, of the shared population or of each device's local search.
        iterations: generations of local search in a round; unused by ``pooled``.
        seed: the run's, the same that the plans carry.

    Raises:
        ConfigError: an unknown method.
    """
    if method == "pooled":
        return Pooled(prompt.d, prompt.sigma0, popsize, seed)
    if method == "fedbpt":
        return FedBPT(prompt.d, prompt.sigma0, popsize, iterations)
    if method == "fedavg":
        return FedAvg(prompt.d, prompt.sigma0, popsize, iterations)
    raise ConfigError(f"unknown method {method!r}: choose pooled, fedbpt or fedavg")
