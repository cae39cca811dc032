"""The methods of aggregation, by name.

A new method is a module with an `Aggregator` and one call of `register`. Modules of this package are imported with it;
any other is imported before the run (``examples/own_aggregation.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.robust import Robust
from fedbpt.errors import ConfigError


@dataclass(frozen=True)
class SearchSettings:
    """What a run's settings say of its search.

    ``d``: dimension of the latent; ``sigma0``: initial step size; ``popsize``: λ, of the shared population or of each
    device's local search; ``iterations``: generations of a local search; ``seed``: the run's, which the plans carry;
    ``robust``, ``byzantine``: see `fedbpt.aggregation.robust`.
    """

    d: int
    sigma0: float
    popsize: int
    iterations: int
    seed: int
    robust: Robust = "none"
    byzantine: int = 1


@dataclass(frozen=True)
class Method:
    """One method of aggregation.

    Attributes:
        name: what ``method`` of a run's settings calls it.
        make: an aggregator before its first round.
        robust: the rules that it works with, ``none`` among them.
        local: a round is a search of ``iterations`` generations on each device (`LocalWork`), not one generation
            that all devices share (`PooledWork`).
        private: its results can be had from losses of candidates only, as differential privacy needs it.
    """

    name: str
    make: Callable[[SearchSettings], Aggregator]
    robust: tuple[Robust, ...] = ("none",)
    local: bool = False
    private: bool = True

    def check_robust(self, robust: Robust) -> None:
        """Raises `ConfigError` for a rule that does not go with this method."""
        if robust not in self.robust:
            choices = ", ".join(self.robust)
            raise ConfigError(f"robust = {robust!r} does not go with method {self.name!r}: choose of {choices}")


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make ``method`` known by its name; returns it.

    Raises:
        ConfigError: another method has that name.
    """
    known = _METHODS.setdefault(method.name, method)
    if known is not method:
        raise ConfigError(f"there is a method {method.name!r} already: give this one another name")
    return method


def method_named(name: str) -> Method:
    """Raises `ConfigError`, which lists the methods, for an unknown ``name``."""
    if name not in _METHODS:
        raise ConfigError(f"unknown method {name!r}: choose of {', '.join(sorted(_METHODS))}")
    return _METHODS[name]
