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
    """The settings of a run's search.

    ``d``: dimension of the latent; ``sigma0``: initial step size; ``popsize``: λ, of the shared population or of each
    device's local search; ``iterations``: generations of a local search; ``seed``: of the run, sent with the plans;
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
        name: value of ``method`` in a run's settings.
        make: makes an aggregator before its first round.
        robust: the robust rules that it supports, including ``none``.
        local: a round is a search of ``iterations`` generations on each device (`LocalWork`), not one generation
            that all devices score (`PooledWork`).
        private: its results depend on the losses of candidates only, as differential privacy requires.
    """

    name: str
    make: Callable[[SearchSettings], Aggregator]
    robust: tuple[Robust, ...] = ("none",)
    local: bool = False
    private: bool = True

    def check_robust(self, robust: Robust) -> None:
        """Raise `ConfigError` for a rule that this method does not support."""
        if robust not in self.robust:
            choices = ", ".join(self.robust)
            raise ConfigError(
                f"method {self.name!r} does not support robust = {robust!r}: choose from {choices}", field="robust"
            )


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Register ``method`` by its name; returns it. Raises `ConfigError` if another method has that name."""
    known = _METHODS.setdefault(method.name, method)
    if known is not method:
        raise ConfigError(f"a method {method.name!r} is registered already: give this one another name", field="name")
    return method


def method_named(name: str) -> Method:
    """The method ``name``; raises `ConfigError`, which lists the methods, for an unknown one."""
    if name not in _METHODS:
        raise ConfigError(f"unknown method {name!r}: choose from {', '.join(sorted(_METHODS))}", field="method")
    return _METHODS[name]
