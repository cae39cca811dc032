"""How reports become the next round: one algorithm a file."""

from __future__ import annotations

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled
from fedbpt.aggregation.robust import Robust
from fedbpt.errors import ConfigError
from fedbpt.protocol.messages import PromptSpec

__all__ = ["Aggregator", "FedAvg", "FedBPT", "Pooled", "Robust", "make_aggregator"]


def make_aggregator(
    method: str,
    prompt: PromptSpec,
    popsize: int,
    iterations: int,
    seed: int,
    robust: Robust = "none",
    byzantine: int = 1,
) -> Aggregator:
    """The aggregator of a run's settings, before its first round.

    Args:
        method: ``pooled``, ``fedbpt`` or ``fedavg``.
        prompt: its d and σ0.
        popsize: λ, of the shared population or of each device's local search.
        iterations: generations of local search in a round; unused by ``pooled``.
        seed: the run's, the same that the plans carry.
        robust: what takes the place of the devices' mean, see `fedbpt.aggregation.robust`.
        byzantine: so many devices may lie where it is robust.

    Raises:
        ConfigError: an unknown method, or one that ``robust`` does not go with.
    """
    if method == "pooled":
        return Pooled(prompt.d, prompt.sigma0, popsize, seed, robust=robust, byzantine=byzantine)
    if method == "fedbpt":
        return FedBPT(prompt.d, prompt.sigma0, popsize, iterations, robust=robust, byzantine=byzantine)
    if method == "fedavg":
        return FedAvg(prompt.d, prompt.sigma0, popsize, iterations, robust, byzantine)
    raise ConfigError(f"unknown method {method!r}: choose pooled, fedbpt or fedavg")
