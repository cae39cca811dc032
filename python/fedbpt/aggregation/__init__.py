"""Algorithms that turn reports into the next round: one a file, each with the `Method` that it registers."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.methods import Method, SearchSettings, method_named, register
from fedbpt.aggregation.robust import Robust

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Aggregator", "Method", "Robust", "SearchSettings", "method_named", "register"]
