"""CMA-ES behind a small ask and tell, with its own random numbers and a state that is plain data.

The update is the ``cma`` package's (Hansen, arXiv 1604.00772; separable variant Ros & Hansen 2008). What is ours is
where the candidates come from: `sample_population` makes them from a `SearchState`, a seed and a generation, so that
a device and the coordinator hold the same candidates without sending them. How the package is driven, and why:

- Step size by cumulative path length (CSA, eq. 43–44). Above 300 dimensions the package would choose two-point
  adaptation, whose first two candidates lie on the last step and so do not follow from the state.
- No mirrored candidates (the package's default below λ = 6): its CSA damping for them assumes that they were drawn.
- Candidates are told with ``check_points=False``: the package has not drawn them itself and would otherwise clip
  their lengths as if they were injected by a stranger.
- Ranks are told instead of losses. The update depends on nothing else, and ties break by candidate number on every
  machine instead of by the platform's sort.
- ``randn`` gives zeros and ``seed`` is NaN, so numpy's global generator is neither read nor seeded; no log, no file.
"""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.errors import InputError
from fedbpt.messages import Array, SearchState
from fedbpt.seeding import generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that matplotlib is missing, which nobody here needs
    import cma

Covariance: TypeAlias = Literal["diagonal", "full"]
Floats: TypeAlias = NDArray[np.float64]

MIN_POPSIZE = 3
"""Smallest population that the ``cma`` package updates from."""

_LIMIT = 1e30  # keeps what float32 rounds positive and finite
_CMA_LOCK = threading.Lock()


# --- candidates from a state -------------------------------------------------------------------------------------


def sample_population(state: SearchState, popsize: int, seed: int, generation: int) -> Floats:
    """Candidates float64 [popsize, d] = mean + σ·(√C·n), n from ``generator(seed, "population", generation)``.

    The one function by which coordinator and devices make the same candidates. Elementwise operations only, each
    of which IEEE 754 defines to the bit; no BLAS, no LAPACK, no eigenvectors. The normals are rounded to float32,
    so that a last-bit difference between two C libraries' logarithms does not show. The first rows do not depend
    on ``popsize``.

    Raises:
        InputError: ``popsize`` < 1, a state with shapes that disagree, scales that are not positive, or a
            covariance that is not positive definite.
    """
    if popsize < 1:
        raise InputError(f"popsize must be at least 1, got {popsize}")
    mean = state.mean.numpy()
    if mean.ndim != 1 or len(mean) == 0:
        raise InputError(f"a search state's mean must have shape [d], got {list(mean.shape)}")
    rng = generator(seed, "population", generation)
    normals = rng.standard_normal((popsize, len(mean))).astype(np.float32).astype(np.float64)
    return mean + state.sigma * transform(state, normals)


def transform(state: SearchState, normals: Floats) -> Floats:
    """√C·n for each row n of ``normals`` [k, d]: by the scales, the Cholesky factor or, where C = I, as it is."""
    d = len(state.mean.numpy())
    if state.scales is not None and state.covariance is not None:
        raise InputError("a search state may hold scales or a covariance, not both")
    if state.scales is not None:
        scales = state.scales.numpy()
        if scales.shape != (d,) or not (scales > 0).all():
            raise InputError(f"a search state's scales must be {d} positive numbers")
        return scales * normals
    if state.covariance is not None:
        covariance = state.covariance.numpy()
        if covariance.shape != (d, d):
            raise InputError(f"a search state's covariance must have shape [{d}, {d}], got {list(covariance.shape)}")
        return _lower_times(cholesky(covariance), normals)
    return normals


def cholesky(covariance: Floats) -> Floats:
    """Lower L [d, d] with L·Lᵀ = ``covariance`` (its lower triangle is read), by elementwise operations.

    LAPACK's factor differs in the last bits from machine to machine; this one does not. O(d³) multiplications in d
    numpy calls: 0.1 s at d = 500.

    Raises:
        InputError: not positive definite.
    """
    rest = np.tril(covariance)
    factor = np.zeros_like(rest)
    for j in range(len(rest)):
        pivot = rest[j, j]
        if not pivot > 0:
            raise InputError(f"a search state's covariance is not positive definite (pivot {j} is {pivot:.3g})")
        column = rest[j:, j] / np.sqrt(pivot)
        factor[j:, j] = column
        rest[j + 1 :, j + 1 :] -= column[1:, None] * column[None, 1:]
    return factor


def _lower_times(factor: Floats, normals: Floats) -> Floats:
    """``normals`` @ ``factor``ᵀ, summed column by column in a fixed order."""
    product = np.zeros_like(normals)
    for j in range(len(factor)):
        product[:, j:] += normals[:, j, None] * factor[None, j:, j]
    return product


# --- the update --------------------------------------------------------------------------------------------------


class CmaUpdate:
    """The ``cma`` package as a function from ranked candidates to the next Gaussian N(mean, σ²·C).

    Args:
        d: dimension.
        sigma: initial step size.
        popsize: candidates per update.
        covariance: ``diagonal`` learns √diag(C) (separable CMA-ES), ``full`` learns C.
        all_parents: μ = λ, all weights positive (FedBPT's server), instead of μ = λ/2 with negative weights.
        mirrors: the package's ``CMA_mirrors``. Not zero only to reproduce other software's step-size damping.
    """

    def __init__(
        self,
        d: int,
        sigma: float,
        popsize: int,
        covariance: Covariance = "diagonal",
        *,
        all_parents: bool = False,
        mirrors: float = 0,
    ) -> None:
        if d < 1:
            raise InputError(f"d must be at least 1, got {d}")
        if not (math.isfinite(sigma) and sigma > 0):
            raise InputError(f"sigma must be positive and finite, got {sigma}")
        if covariance not in ("diagonal", "full"):
            raise InputError(f"covariance must be 'diagonal' or 'full', got {covariance!r}")
        self.covariance: Covariance = covariance
        self._all_parents = all_parents
        self._check_popsize(popsize)
        options: dict[str, Any] = {
            "popsize": popsize,
            "CMA_mu": popsize if all_parents else None,
            "CMA_diagonal": covariance == "diagonal",
            "CMA_mirrors": mirrors,
            "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
            "randn": lambda rows, columns: np.zeros((rows, columns)),
            "seed": math.nan,
            "updatecovwait": 0,  # the inverse root of C follows each update
            "conditioncov_alleviate": [],  # it would change the coordinate system behind our back
            "verbose": -9,
            "verb_disp": 0,
            "verb_log": 0,
            "signals_filename": None,
        }
        with _quiet():
            self._es = cma.CMAEvolutionStrategy(np.zeros(d), float(sigma), options)
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
        ranks = np.empty(len(values))
        ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
        with _quiet():
            self._es.ask()  # what it returns (the mean, since randn is zero) is not used
            self._es.tell(list(points), list(ranks), check_points=None if foreign else False)
            # Devices draw around the float32 mean. Were the package to keep its own, the difference would count as
            # a step, a huge one once σ is below float32's resolution of the mean.
            self._es.mean = self._es.mean.astype(np.float32).astype(np.float64)
            self._es.sigma = float(np.clip(self._es.sigma, 1 / _LIMIT, _LIMIT))

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
        scales = np.broadcast_to(np.asarray(self._es.sigma_vec.scaling, dtype=np.float64), self._es.mean.shape)
        sigma = float(np.float32(self.sigma))
        mean = Array.of(self._es.mean, "<f4")
        if self.covariance == "diagonal":
            return SearchState(mean=mean, sigma=sigma, scales=Array.of(np.clip(scales, 1 / _LIMIT, _LIMIT), "<f4"))
        matrix = np.asarray(self._es.sm.C, dtype=np.float64)
        matrix = scales[:, None] * ((matrix + matrix.T) / 2) * scales[None, :]
        return SearchState(mean=mean, sigma=sigma, covariance=Array.of(matrix, "<f8"))

    def digest(self) -> str:
        """sha256 (hex) of everything that decides the next update: mean, σ, C, both evolution paths, generation."""
        es = self._es
        parts = [es.mean, es.sigma, es.sigma_vec.scaling, es.pc, es.adapt_sigma.ps, es.countiter, es.sp.popsize]
        if self.covariance == "full":
            parts.append(es.sm.C)
        digest = hashlib.sha256(self.covariance.encode())
        for part in parts:
            values = np.ascontiguousarray(part, dtype="<f8")
            digest.update(f"|{values.shape}|".encode() + values.tobytes())
        return digest.hexdigest()

    def _check_popsize(self, popsize: int) -> None:
        least = 2 if self._all_parents else MIN_POPSIZE
        if popsize < least:
            raise InputError(f"popsize must be at least {least}, got {popsize}")

    def _lift_floor(self) -> None:
        # With μ = λ two candidates are enough for an update, but the package refuses λ + mirrors < 3. The mirrors
        # enter nothing else once the damping is computed.
        if self._es.sp.popsize < MIN_POPSIZE:
            self._es.sp.lam_mirr = MIN_POPSIZE - self._es.sp.popsize


@contextmanager
def _quiet() -> Iterator[None]:
    """The package warns of rare but harmless things (a coordinate beyond 7.4 σ); users cannot act on them."""
    with _CMA_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- ask and tell ------------------------------------------------------------------------------------------------


class CmaSearch:
    """CMA-ES by ask and tell. Same arguments and same losses give the same bits: replaying the losses restores it.

    Args:
        d: dimension of the latent.
        sigma0: initial step size.
        popsize: candidates per generation, λ.
        seed: of the candidates.
        covariance: ``diagonal`` or ``full``.
    """

    def __init__(
        self, d: int, sigma0: float = 1.0, popsize: int = 16, seed: int = 0, covariance: Covariance = "diagonal"
    ) -> None:
        self._update = CmaUpdate(d, sigma0, popsize, covariance)
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
    def generation(self) -> int:
        """Generations told so far."""
        return self._update.generation

    @property
    def evaluations(self) -> int:
        """Candidates told so far."""
        return self.generation * self.popsize

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
        return hashlib.sha256(f"{self.seed}|{self.popsize}|{self._update.digest()}".encode()).hexdigest()

    def __repr__(self) -> str:
        kind = self._update.covariance
        return (
            f"CmaSearch(d={self.d}, {kind}, popsize={self.popsize}, generation={self.generation}, σ={self.sigma:.3g})"
        )
