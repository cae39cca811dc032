"""CMA-ES with an ask-and-tell interface, explicit random numbers and a plain-data state.

The update is that of the ``cma`` package (Hansen, arXiv 1604.00772; separable variant Ros & Hansen 2008). The
candidates are drawn by `fedbpt.search.population`. Deviations from the package's defaults:

- The step size is adapted by cumulative path length (CSA, eq. 43–44) or, as in the package from 300 dimensions on, by
  two points (TPA, Hansen et al. 2014): the first two candidates lie on the mean's last step, forwards and backwards,
  and their ranks decide. With noisy losses and a too large σ, CSA lets the mean wander, whereas TPA lowers σ. The step
  is part of the state. Its length is the expected length of the normals, where the package draws from a χ.
- No mirrored candidates (the package's default below λ = 6): its CSA damping for them assumes that they were drawn.
- ``check_points=False`` in ``tell``: the package did not draw the candidates itself, and would clip their lengths as
  those of injected solutions.
- ``tell`` gets ranks instead of losses. The update depends on nothing else, and ties are broken by candidate number
  instead of by the platform's sort.
- ``randn`` returns ones and ``seed`` is NaN, so that numpy's global generator is neither used nor seeded (the package's
  TPA would use it to check the mirrored pair, which is overridden). No log, no files.
"""

from __future__ import annotations

import hashlib
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from fedbpt.errors import ConfigError, InputError
from fedbpt.machine.interrupts import uninterrupted
from fedbpt.protocol.rounds import SearchState
from fedbpt.protocol.specs import Array
from fedbpt.search.population import Floats, sample_population

Covariance: TypeAlias = Literal["diagonal", "full"]
StepSize: TypeAlias = Literal["auto", "path", "two_point"]

MIN_POPSIZE = 3
"""Smallest population that the ``cma`` package can update from."""

TWO_POINT_DIMENSION = 300
"""Smallest dimension at which ``auto`` selects two-point adaptation, as in the ``cma`` package."""

MOST_RANKED = 256
"""Largest population whose ranks fit into bytes."""

_SMALLEST = 1e-30  # stays positive in float32
_LARGEST_NORM = 1e8  # of a state's arrays; messages allow ten times as much (`fedbpt.protocol.codec.MAX_NORM`)
_CMA_LOCK = threading.Lock()


TESTED_CMA = "pip install 'cma>=4.5,<4.6'"

_UNUSED = ("matplotlib", "scipy")
"""Optional imports of the ``cma`` package for features not used here, which would cost 2 s and 80 MB."""


_PARTS = ("CMAEvolutionStrategy", "sigma_adaptation.CMAAdaptSigmaTPA", "sigma_adaptation.CMAAdaptSigmaCSA")
_STATE = ("sp.weights.mueff", "sp.popsize", "sm", "sigma_vec.scaling", "adapt_sigma", "pc", "countiter", "opts")
"""The attributes used of the package and of its strategy, some of which are not public."""


def _require(owner: object, names: Sequence[str]) -> None:
    """Raise `ConfigError` if the installed version of the package lacks an attribute."""
    for name in names:
        try:
            attrgetter(name)(owner)
        except AttributeError:
            version = getattr(_cma(), "__version__", "here")
            raise ConfigError(f"cma {version} has no {name}: install a tested version, {TESTED_CMA}") from None


@cache
def _cma() -> Any:
    """The ``cma`` package, imported at first use."""
    absent = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None prevents the import
    try:
        with uninterrupted(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that matplotlib is missing
            import cma
    finally:
        for name in absent:
            del sys.modules[name]
    return cma


@cache
def _two_point() -> Any:
    """The package's TPA without its consistency check, which uses numpy's global generator."""

    class TwoPoint(_cma().sigma_adaptation.CMAAdaptSigmaTPA):  # type: ignore[misc]
        def check_consistency(self, es: object) -> None:
            """Do nothing: the pair is mirrored by construction, see `sample_population`."""

    return TwoPoint


class CmaUpdate:
    """The ``cma`` package as a function from ranked candidates to the next Gaussian N(mean, σ²·C).

    Args:
        d: dimension.
        sigma: initial step size.
        popsize: candidates per update.
        covariance: ``diagonal`` learns √diag(C) (separable CMA-ES), ``full`` learns C.
        step_size: ``path``, ``two_point``, or ``auto`` (see `TWO_POINT_DIMENSION`). ``two_point`` uses the ranks of the
            first two candidates, which must be those of the state's ``step``.
        all_parents: μ = λ with positive weights (FedBPT's server), instead of μ = λ/2 with negative weights.
        mirrors: the package's ``CMA_mirrors``; only nonzero to reproduce other software's step-size damping.
        start: initial mean [d], rounded to float32 as devices get it; None: 0.

    Raises:
        InputError: an invalid argument.
        ConfigError: an untested version of the ``cma`` package that lacks a part.
    """

    def __init__(
        self,
        d: int,
        sigma: float,
        popsize: int,
        covariance: Covariance = "diagonal",
        *,
        step_size: StepSize = "auto",
        all_parents: bool = False,
        mirrors: float = 0,
        start: ArrayLike | None = None,
    ) -> None:
        if d < 1:
            raise InputError(f"d must be at least 1, got {d}", field="d")
        if not (math.isfinite(sigma) and sigma > 0):
            raise InputError(f"sigma must be positive and finite, got {sigma}", field="sigma")
        if covariance not in ("diagonal", "full"):
            raise InputError(f"covariance must be 'diagonal' or 'full', got {covariance!r}", field="covariance")
        if step_size not in ("auto", "path", "two_point"):
            raise InputError(f"step_size must be 'auto', 'path' or 'two_point', got {step_size!r}", field="step_size")
        self.covariance: Covariance = covariance
        self._two_point = d >= TWO_POINT_DIMENSION if step_size == "auto" else step_size == "two_point"
        self._step: Floats | None = None
        self._all_parents = all_parents
        self._check_popsize(popsize)
        options: dict[str, Any] = {
            "popsize": popsize,
            "CMA_mu": popsize if all_parents else None,
            "CMA_diagonal": covariance == "diagonal",
            "CMA_mirrors": mirrors,
            "AdaptSigma": _two_point() if self._two_point else _cma().sigma_adaptation.CMAAdaptSigmaCSA,
            "randn": lambda rows, columns: np.ones((rows, columns)),
            "seed": math.nan,
            "updatecovwait": 0,  # recompute C's inverse square root after each update
            "conditioncov_alleviate": [],  # it would change the coordinate system
            "verbose": -9,
            "verb_disp": 0,
            "verb_log": 0,
            "signals_filename": None,
        }
        self._farthest = farthest(sigma, d)
        with _quiet():
            _require(_cma(), _PARTS)
            self._es = _cma().CMAEvolutionStrategy(_as_sent(np.zeros(d) if start is None else start), sigma, options)
            _require(self._es, _STATE)
            self._lift_floor()

    @property
    def mean(self) -> Floats:
        return np.array(self._es.mean, dtype=np.float64)

    @property
    def sigma(self) -> float:
        return float(self._es.sigma)

    @sigma.setter
    def sigma(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"sigma must be positive and finite, got {value}", field="sigma")
        self._es.sigma = float(value)

    @property
    def mueff(self) -> float:
        """Variance-effective number of parents, eq. 8."""
        return float(self._es.sp.weights.mueff)

    @property
    def generation(self) -> int:
        """Number of updates so far."""
        return int(self._es.countiter)

    def update(self, candidates: ArrayLike, losses: ArrayLike, *, foreign: bool = False) -> None:
        """Move to the next generation.

        Args:
            candidates: [popsize, d].
            losses: [popsize], lower is better; only their order matters, and ties go to the lower index.
            foreign: the candidates were not drawn from this distribution. Those whose Mahalanobis distance exceeds
                √d + 2d/(d+2) are then moved towards the mean (Hansen 2011, arXiv 1110.4181).

        Raises:
            InputError: wrong shapes, NaN or infinity.
        """
        points = np.array(candidates, dtype=np.float64)
        values = np.array(losses, dtype=np.float64)
        expected = (int(self._es.sp.popsize), len(self._es.mean))
        if points.shape != expected:
            raise InputError(
                f"candidates must have shape {list(expected)}, got {list(points.shape)}", field="candidates"
            )
        if values.shape != expected[:1]:
            raise InputError(f"losses must have shape [{expected[0]}], got {list(values.shape)}", field="losses")
        for name, array in (("candidates", points), ("losses", values)):
            if not np.isfinite(array).all():
                raise InputError(f"{name} must be finite, got NaN or infinity", field=name)
        ranks = ranks_of(values)
        with _quiet():
            self._es.ask()  # begins the generation; the result is not used
            self._es.tell(list(points), list(ranks), check_points=None if foreign else False)
            # Devices draw around the float32 mean. If the package kept its own, the difference would count as a step,
            # a huge one once σ is below float32's resolution of the mean.
            self._es.mean = _as_sent(np.clip(self._es.mean, -self._farthest, self._farthest))
            self._es.sigma = step_within(self._es.sigma, self._farthest / max(self._widest(), 1.0))
            if self._two_point:
                self._step = self._next_step()

    def resize(self, popsize: int) -> None:
        """Recompute weights and learning rates for ``popsize`` candidates; keep mean, σ, C and paths."""
        if popsize == self._es.sp.popsize:
            return
        self._check_popsize(popsize)
        es = self._es
        with _quiet():
            es.opts["popsize"] = popsize
            es.opts["CMA_mu"] = popsize if self._all_parents else None
            es.sp.set(es.opts, popsize=popsize, verbose=False)
            if self.covariance == "diagonal":
                es.sp.weights.finalize_negative_weights(es.N, es.sp.c1_sep, es.sp.cmu_sep, pos_def=False)
            else:
                rates = es.sm.parameters(mueff=es.sp.weights.mueff, lam=es.sp.weights.lambda_)
                es.sp.weights.finalize_negative_weights(es.N, rates["c1"], rates["cmu"])
            es.adapt_sigma.initialize_settings(es, reset=True)
            self._lift_floor()

    def state(self) -> SearchState:
        """The distribution as sent to devices: float32, except for a full covariance, which rounding could make
        indefinite.
        """
        step = None if self._step is None else Array.of(self._step, "<f4")
        scales = self._scales()
        sigma = float(np.float32(self.sigma))
        mean = Array.of(self._es.mean, "<f4")
        if self.covariance == "diagonal":
            return SearchState(mean=mean, sigma=sigma, scales=Array.of(scales, "<f4"), step=step)
        matrix = np.asarray(self._es.sm.C, dtype=np.float64)
        matrix = scales[:, None] * ((matrix + matrix.T) / 2) * scales[None, :]
        matrix *= min(1.0, _LARGEST_NORM / np.linalg.norm(matrix))
        return SearchState(mean=mean, sigma=sigma, covariance=Array.of(matrix, "<f8"), step=step)

    def digest(self) -> str:
        """sha256 (hexadecimal) of all that determines the next update: mean, σ, C, paths, step, generation."""
        es = self._es
        paths = [es.pc, getattr(es.adapt_sigma, "ps", ()), getattr(es.adapt_sigma, "s", ())]
        step = () if self._step is None else self._step
        parts = [es.mean, es.sigma, es.sigma_vec.scaling, *paths, step, es.countiter, es.sp.popsize]
        if self.covariance == "full":
            parts.append(es.sm.C)
        digest = hashlib.sha256(self.covariance.encode())
        for part in parts:
            values = np.ascontiguousarray(part, dtype="<f8")
            digest.update(f"|{values.shape}|".encode() + values.tobytes())
        return digest.hexdigest()

    def _scales(self) -> Floats:
        """√diag(C) [d] for a diagonal covariance; ones for a full one."""
        scales = np.broadcast_to(np.asarray(self._es.sigma_vec.scaling, dtype=np.float64), self._es.mean.shape)
        return np.clip(scales, _SMALLEST, _LARGEST_NORM / math.sqrt(len(scales)))

    def _widest(self) -> float:
        """The largest standard deviation of a coordinate for σ = 1."""
        own = 1.0 if self.covariance == "diagonal" else math.sqrt(np.max(np.diag(self._es.sm.C)))
        return float(np.max(self._scales())) * own

    def _next_step(self) -> Floats | None:
        """The mean's last move, scaled to the expected length of normals: E‖N(0, I)‖ of eq. 43."""
        move = self._es.mean - self._es.mean_old
        norm = float(self._es.mahalanobis_norm(move))
        d = len(move)
        length = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
        if not (math.isfinite(norm) and norm > 0):
            return None  # the mean did not move: use two ordinary candidates
        return np.array(move * (length / norm / self.sigma))

    def _check_popsize(self, popsize: int) -> None:
        least = 2 if self._all_parents else MIN_POPSIZE
        if popsize < least:
            raise InputError(f"popsize must be at least {least}, got {popsize}", field="popsize", limit=least)

    def _lift_floor(self) -> None:
        # With μ = λ two candidates are enough for an update, but the package requires λ + mirrors >= 3. The mirrors
        # have no other effect once the damping is computed.
        if self._es.sp.popsize < MIN_POPSIZE:
            self._es.sp.lam_mirr = MIN_POPSIZE - self._es.sp.popsize


def farthest(sigma0: float, d: int) -> float:
    """Bound of the mean's coordinates and of the step size in a search with initial step size ``sigma0``.

    A million times the initial scale: for any ranks, the search keeps a state that devices accept.
    """
    return min(1e6 * sigma0, _LARGEST_NORM / math.sqrt(d))


def step_within(sigma: float, limit: float) -> float:
    """Clip ``sigma`` to at most ``limit`` and to what float32 distinguishes from 0."""
    return float(np.clip(sigma, _SMALLEST, limit))


def ranks_of(losses: ArrayLike) -> Floats:
    """The rank of each loss, 0 for the lowest; of equal losses, the lower index has the lower rank."""
    values = np.asarray(losses)
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def rank_bytes(losses: ArrayLike) -> bytes:
    """`ranks_of` as bytes; empty for more than `MOST_RANKED` losses."""
    ranks = ranks_of(losses)
    return ranks.astype(np.uint8).tobytes() if len(ranks) <= MOST_RANKED else b""


def _as_sent(mean: ArrayLike) -> Floats:
    return np.asarray(mean).astype(np.float32).astype(np.float64)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the package's warnings about rare but harmless events (a coordinate beyond 7.4 σ)."""
    with _CMA_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class CmaSearch:
    """CMA-ES with ask and tell. Deterministic to the bit: telling the same losses again restores a search.

    Args:
        d: dimension of the latent.
        sigma0: initial step size.
        popsize: candidates per generation, λ.
        seed: seed of the candidates.
        covariance: ``diagonal`` or ``full``.
        step_size: see `CmaUpdate`.
        start: see `CmaUpdate`.
        first: number of the first generation, so that a search after a restart draws other candidates.
    """

    def __init__(
        self,
        d: int,
        sigma0: float = 1.0,
        popsize: int = 16,
        seed: int = 0,
        covariance: Covariance = "diagonal",
        step_size: StepSize = "auto",
        start: ArrayLike | None = None,
        first: int = 0,
    ) -> None:
        self._update = CmaUpdate(d, sigma0, popsize, covariance, step_size=step_size, start=start)
        self._first = first
        self._asked: Floats | None = None
        self.popsize = popsize
        self.seed = seed
        self.d = d

    @property
    def mean(self) -> Floats:
        return self._update.mean

    @property
    def sigma(self) -> float:
        return self._update.sigma

    @property
    def told(self) -> int:
        """Number of generations told so far."""
        return self._update.generation

    @property
    def generation(self) -> int:
        """Number of the generation that `ask` returns."""
        return self._first + self.told

    @property
    def evaluations(self) -> int:
        """Number of candidates told so far."""
        return self.told * self.popsize

    def ask(self) -> Floats:
        """This generation's candidates, float64 [popsize, d]; the same until `tell`."""
        if self._asked is None:
            self._asked = sample_population(self.state(), self.popsize, self.seed, self.generation)
        return np.array(self._asked)

    def tell(self, losses: ArrayLike) -> None:
        """Update with the losses [popsize] of the candidates from `ask`. Raises `InputError` as `CmaUpdate.update`."""
        self._update.update(self.ask(), losses)
        self._asked = None

    def state(self) -> SearchState:
        """The state from which a device draws the same candidates; see `CmaUpdate.state`."""
        return self._update.state()

    def digest(self) -> str:
        """sha256 (hexadecimal) of all that determines the next generations, including seed and population size."""
        return hashlib.sha256(f"{self.seed}|{self.popsize}|{self._first}|{self._update.digest()}".encode()).hexdigest()

    def __repr__(self) -> str:
        kind = self._update.covariance
        return (
            f"CmaSearch(d={self.d}, {kind}, popsize={self.popsize}, generation={self.generation}, σ={self.sigma:.3g})"
        )
