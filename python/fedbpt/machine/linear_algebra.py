"""`one_blas_thread`: linear algebra of small matrices on the calling thread alone.

Where several threads multiply matrices at the same time, as devices that share a process do, OpenBLAS up to 0.3.31
mixes up their blocks (https://github.com/OpenMathLib/OpenBLAS/issues/5836). And on cores that score texts meanwhile,
its own threads wait for each other many times longer than the product of small matrices takes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may hold it


os.register_at_fork(after_in_child=_after_fork)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def one_blas_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate ``function``: it runs in one thread at a time, and BLAS uses that one thread."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock, _blas().limit(limits=1):
            return function(*args, **kwargs)

    return alone


@one_blas_thread
def product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """``left @ right``."""
    found: NDArray[Any] = left @ right
    return found
