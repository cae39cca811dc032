"""CMA-ES behind a small ask and tell, with its own random numbers and a state that is plain data.

The update is the ``cma`` package's (Hansen, arXiv 1604.00772; separable variant Ros & Hansen 2008). What is ours is
where the candidates come from (`fedbpt.search.population`). How the package is driven, and why:

- Step size by cumulative path length (CSA, eq. 43–44) or, as the package does from 300 dimensions on, by two points
  (TPA, Hansen et al. 2014): the first two candidates lie on the last step of the mean, forwards and backwards, and
  their ranks decide. Where losses are noisy and σ too large, CSA lets the mean wander; TPA lowers σ. The step is a
  part of the state. Its length is the normals' expected one, where the package draws a χ.
- No mirrored candidates (the package's default below λ = 6): its CSA damping for them assumes that they were drawn.
- Candidates are told with ``check_points=False``: the package has not drawn them itself and would otherwise clip
  their lengths as if they were injected by a stranger.
- Ranks are told instead of losses. The update depends on nothing else, and ties break by candidate number on every
  machine instead of by the platform's sort.
- ``randn`` gives ones and ``seed`` is NaN, so numpy's global generator is neither read nor seeded (the package's TPA
  would read it to check the mirrored pair: not ours); no log, no file.
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
"""Smallest population that the ``cma`` package updates from."""

TWO_POINT_DIMENSION = 300
"""From here on ``auto`` adapts the step size by two points, as the ``cma`` package does."""

MOST_RANKED = 256
"""Candidates whose ranks fit into bytes."""

_SMALLEST = 1e-30  # keeps what float32 rounds positive
_LARGEST_NORM = 1e8  # of a state's arrays; a message bears ten times as much (`fedbpt.protocol.codec.MAX_NORM`)
_CMA_LOCK = threading.Lock()


TESTED_CMA = "pip install 'cma>=4.5,<4.6'"

_UNUSED = ("matplotlib", "scipy")
"""What the ``cma`` package imports where it is installed, for parts that nobody here uses: 2 s and 80 MB."""


_PARTS = ("CMAEvolutionStrategy", "sigma_adaptation.CMAAdaptSigmaTPA", "sigma_adaptation.CMAAdaptSigmaCSA")
_STATE = ("sp.weights.mueff", "sp.popsize", "sm", "sigma_vec.scaling", "adapt_sigma", "pc", "countiter", "opts")
"""What we use of the package and of its strategy, some of which is not its public interface."""


def _require(owner: object, names: Sequence[str]) -> None:
    """Raises `ConfigError` where another version of the package lacks a part."""
    for name in names:
        try:
            attrgetter(name)(owner)
        except AttributeError:
            version = getattr(_cma(), "__version__", "here")
            raise ConfigError(f"cma {version} has no {name}: install a version that is tested, {TESTED_CMA}") from None


@cache
def _cma() -> Any:
    """The ``cma`` package, imported at first use."""
    absent = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None: cannot be imported
    try:
        with uninterrupted(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that matplotlib is missing, which nobody here needs
            import cma
    finally:
        for name in absent:
            del sys.modules[name]
    return cma


@cache
def _two_point() -> Any:
    """The package's, without its check of candidates that it has not drawn: that reads numpy's global generator."""

    class TwoPoint(_cma().sigma_adaptation.CMAAdaptSigmaTPA):  # type: ignore[misc]
        def check_consistency(self, es: object) -> None:
            """The pair is mirrored by construction, see `sample_population`."""

    return TwoPoint


class CmaUpdate:
    """The ``cma`` package as a function from ranked candidates to the next Gaussian N(mean, σ²·C).

    Args:
        d: dimension.
        sigma: initial step size.
        popsize: candidates per update.
        covariance: ``diagonal`` learns √diag(C) (separable CMA-ES), ``full`` learns C.
        step_size: ``path``, ``two_point``, or ``auto``: by `TWO_POINT_DIMENSION`. ``two_point`` reads the ranks of the
            first two candidates, which must be those of the state's ``step``.
        all_parents: μ = λ, all weights positive (FedBPT's server), instead of μ = λ/2 with negative weights.
        mirrors: the package's ``CMA_mirrors``. Not zero only to reproduce other software's step-size damping.
        start: first mean [d], rounded to float32, as devices get it; None: 0.
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
            raise InputError(f"d must be at least 1, got {d}")
        if not (math.isfinite(sigma) and sigma > 0):
            raise InputError(f"sigma must be positive and finite, got {sigma}")
        if covariance not in ("diagonal", "full"):
            raise InputError(f"covariance must be 'diagonal' or 'full', got {covariance!r}")
        if step_size not in ("auto", "path", "two_point"):
            raise InputError(f"step_size must be 'auto', 'path' or 'two_point', got {step_size!r}")
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
            "updatecovwait": 0,  # the inverse root of C follows each update
            "conditioncov_alleviate": [],  # it would change the coordinate system behind our back
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
            raise InputError(f"sigma must be positive and finite, got {value}")
        self._es.sigma = float(value)

    @property
    def mueff(self) -> float:
        """Variance-effective number of parents, eq. 8."""
        return float(self._es.sp.weights.mueff)

    @property
    def generation(self) -> int:
        """Updates made so far."""
        return int(self._es.countiter)

    def update(self, candidates: ArrayLike, losses: ArrayLike, *, foreign: bool = False) -> None:
        """Move to the next generation.

        Args:
            candidates: [popsize, d].
            losses: [popsize], lower is better; only their order matters, ties go to the lower index.
            foreign: the candidates were not drawn from this distribution. Each is then drawn in towards the mean
                where its Mahalanobis distance exceeds √d + 2d/(d+2) (Hansen 2011, arXiv 1110.4181).

        Raises:
            InputError: wrong shapes, NaN or infinity.
        """
        points = np.array(candidates, dtype=np.float64)
        values = np.array(losses, dtype=np.float64)
        expected = (int(self._es.sp.popsize), len(self._es.mean))
        if points.shape != expected:
            raise InputError(f"candidates must have shape {list(expected)}, got {list(points.shape)}")
        if values.shape != expected[:1]:
            raise InputError(f"losses must have shape [{expected[0]}], got {list(values.shape)}")
        if not (np.isfinite(points).all() and np.isfinite(values).all()):
            raise InputError("candidates or losses hold NaN or infinity")
        ranks = ranks_of(values)
        with _quiet():
            self._es.ask()  # opens the generation; what it returns is not used
            self._es.tell(list(points), list(ranks), check_points=None if foreign else False)
            # Devices draw around the float32 mean. Were the package to keep its own, the difference would count as
            # a step, a huge one once σ is below float32's resolution of the mean.
            self._es.mean = _as_sent(np.clip(self._es.mean, -self._farthest, self._farthest))
            self._es.sigma = step_within(self._es.sigma, self._farthest / max(self._widest(), 1.0))
            if self._two_point:
                self._step = self._next_step()

    def resize(self, popsize: int) -> None:
        """Recompute weights and learning rates for ``popsize`` candidates; mean, σ, C and paths stay."""
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
        """The distribution as devices get it: float32 but for a full covariance, which rounding could make
        indefinite."""
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
        """sha256 (hex) of everything that decides the next update: mean, σ, C, evolution paths, step, generation."""
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
        """√diag(C) [d] of a separable search; ones of a full one."""
        scales = np.broadcast_to(np.asarray(self._es.sigma_vec.scaling, dtype=np.float64), self._es.mean.shape)
        return np.clip(scales, _SMALLEST, _LARGEST_NORM / math.sqrt(len(scales)))

    def _widest(self) -> float:
        """The largest standard deviation of a coordinate, σ being 1."""
        own = 1.0 if self.covariance == "diagonal" else math.sqrt(np.max(np.diag(self._es.sm.C)))
        return float(np.max(self._scales())) * own

    def _next_step(self) -> Floats | None:
        """The mean's last move, made as long as normals are expected to be: E‖N(0, I)‖ of eq. 43."""
        move = self._es.mean - self._es.mean_old
        norm = float(self._es.mahalanobis_norm(move))
        d = len(move)
        length = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))
        if not (math.isfinite(norm) and norm > 0):
            return None  # the mean stood still: two ordinary candidates say as much
        return np.array(move * (length / norm / self.sigma))

    def _check_popsize(self, popsize: int) -> None:
        least = 2 if self._all_parents else MIN_POPSIZE
        if popsize < least:
            raise InputError(f"popsize must be at least {least}, got {popsize}")

    def _lift_floor(self) -> None:
        # With μ = λ two candidates are enough for an update, but the package refuses λ + mirrors < 3. The mirrors
        # enter nothing else once the damping is computed.
        if self._es.sp.popsize < MIN_POPSIZE:
            self._es.sp.lam_mirr = MIN_POPSIZE - self._es.sp.popsize


def farthest(sigma0: float, d: int) -> float:
    """How far from 0 a mean's coordinate may come, and how large a step size, in a search that begins with ``sigma0``.

    A million times as far as an honest search begins: whatever the ranks, it goes on from a state that devices accept.
    """
    return min(1e6 * sigma0, _LARGEST_NORM / math.sqrt(d))


def step_within(sigma: float, limit: float) -> float:
    """``sigma``, not below what float32 can tell from 0 and not above ``limit``."""
    return float(np.clip(sigma, _SMALLEST, limit))


def ranks_of(losses: ArrayLike) -> Floats:
    """The rank of each loss, 0 for the lowest; ties go to the lower index."""
    values = np.asarray(losses)
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def rank_bytes(losses: ArrayLike) -> bytes:
    """`ranks_of`, a byte each; empty where there are more than `MOST_RANKED`."""
    ranks = ranks_of(losses)
    return ranks.astype(np.uint8).tobytes() if len(ranks) <= MOST_RANKED else b""


def _as_sent(mean: ArrayLike) -> Floats:
    return np.asarray(mean).astype(np.float32).astype(np.float64)


@contextmanager
def _quiet() -> Iterator[None]:
    """The package warns of rare but harmless things (a coordinate beyond 7.4 σ); users cannot act on them."""
    with _CMA_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class CmaSearch:
    """CMA-ES by ask and tell. Same arguments and same losses give the same bits: replaying the losses restores it.

    Args:
        d: dimension of the latent.
        sigma0: initial step size.
        popsize: candidates per generation, λ.
        seed: of the candidates.
        covariance: ``diagonal`` or ``full``.
        step_size: see `CmaUpdate`.
        start: see `CmaUpdate`.
        first: the first generation's number: a search that follows another draws candidates of its own.
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
        """float64 [d]."""
        return self._update.mean

    @property
    def sigma(self) -> float:
        return self._update.sigma

    @property
    def told(self) -> int:
        """Generations told so far."""
        return self._update.generation

    @property
    def generation(self) -> int:
        """The number of the one that `ask` gives."""
        return self._first + self.told

    @property
    def evaluations(self) -> int:
        """Candidates told so far."""
        return self.told * self.popsize

    def ask(self) -> Floats:
        """This generation's candidates, float64 [popsize, d]. The same until `tell`."""
        if self._asked is None:
            self._asked = sample_population(self.state(), self.popsize, self.seed, self.generation)
        return np.array(self._asked)

    def tell(self, losses: ArrayLike) -> None:
        """Losses [popsize] of what `ask` returned. Raises `InputError` for a wrong number of them, NaN, infinity."""
        self._update.update(self.ask(), losses)
        self._asked = None

    def state(self) -> SearchState:
        """What a device needs to make the same candidates; float32 but for a full covariance."""
        return self._update.state()

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next, seed and population size included."""
        return hashlib.sha256(f"{self.seed}|{self.popsize}|{self._first}|{self._update.digest()}".encode()).hexdigest()

    def __repr__(self) -> str:
        kind = self._update.covariance
        return (
            f"CmaSearch(d={self.d}, {kind}, popsize={self.popsize}, generation={self.generation}, σ={self.sigma:.3g})"
        )
