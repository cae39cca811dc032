"""Consistency checks of a loaded model that need no reference.

They detect a wrong graph, a wrong vocabulary, or a kernel whose rounding depends on the batch. They do not compare with
the reference implementation: docs/models.md lists the architectures for which that was done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedbpt import models
from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.errors import InputError
from fedbpt.model_check.findings import ModelFacts
from fedbpt.protocol.specs import Placement

TEXTS = (
    "The river rose again last night, and two bridges are closed until the water falls.",
    "Prices fell by 12.5% in 2019 (see page 7): a third month in a row.",
    "Zażółć gęślą jaźń; 漢字かな交じり文; Привет, мир! \N{SLIGHTLY SMILING FACE}",
    "def f(x):\n\treturn x  +  1\n",
    "<s> <|im_end|> </s> [INST] <bos>",  # control tokens' names in a text must stay text
)

FLOATS = ("f32", "f16", "bf16")
ROUNDING_FLOAT = 0.02
ROUNDING_QUANTIZED = 0.15
"""Tolerance for a logit, or a token's log-probability in nats, computed in different batches: quantised weights have
activations rounded to 8 bits, which amplifies differences in the last bit."""

_LOGIT_STD = 3.0  # standard deviation of the logits for which these tolerances hold
_MAX_TOKENS = 48  # of a text: a few seconds for a small model
_SCORED_TOKENS = 16

Outcome = tuple[bool, str]
"""Whether a check holds, and details."""


class Probes:
    """The checks of a loaded model, one method each."""

    def __init__(self, scorer: NativeScorer) -> None:
        self.scorer = scorer
        self._bos = scorer.tokenize("")
        n_free = scorer.n_ctx_train - len(self._bos)
        self._n_rows = max(1, min(4, n_free // 4))
        self._n_new = max(1, min(4, n_free // 4))
        self._n_longest = min(_MAX_TOKENS, n_free - self._n_rows - self._n_new)

    @cached_property
    def facts(self) -> ModelFacts:
        scorer = self.scorer
        parts = models.model_parts(scorer.path)
        shapes = models.tensor_shapes(scorer.path)
        return ModelFacts(
            architecture=scorer.architecture,
            n_params=sum(math.prod(shape) for shape in shapes.values()),
            size=models.model_size(scorer.path),
            n_files=len(parts),
            formats=tuple(part.type for part in scorer.weight_formats),
            n_ctx=scorer.n_ctx_train,
            n_vocab=scorer.n_vocab,
            n_embd=scorer.n_embd,
            chat=self._chats(),
            fingerprint=scorer.fingerprint,
            notes=scorer.notes,
        )

    def tokenizes(self) -> Outcome:
        for text in TEXTS:
            pieces = b"".join(self.scorer.generator.piece(int(token)) for token in self.scorer.tokenize(text, False))
            if pieces.removeprefix(b" ") != text.encode():  # SentencePiece prepends a space to a text
                return False, f"{text!r} is decoded as {pieces.decode(errors='backslashreplace')!r}"
        return True, f"{len(TEXTS)} texts"

    def repeats(self) -> Outcome:
        largest = 0.0
        for placement in ("front", "cue"):
            outcome, difference = self._repeats(placement)
            if not outcome[0]:
                return outcome
            largest = max(largest, difference)
        candidates = "the same bits" if self._exact else "the same except for rounding"
        return True, f"candidates: {candidates}; texts: {_described(largest)}"

    def rows(self) -> Outcome:
        ids = self._text(_SCORED_TOKENS)
        n = self._n_rows
        plain = self._score([ids], self._no_rows)
        front = self._score([ids[n:]], self.scorer.token_embeddings(ids[:n])[None])
        cue = self._score([ids], self.scorer.token_embeddings(ids[-n:])[None], placement="cue")
        return self._within(max(_distance(front, plain), _distance(cue, plain)), "logits")

    def labels(self) -> Outcome:
        texts = [self._text(_SCORED_TOKENS), self._text(_SCORED_TOKENS // 2, 5)]
        embeds = self._candidates[:1]
        all_logits = self._score(texts, embeds)
        difference = _distance(self._score(texts, embeds, self._labels), all_logits[..., self._labels])
        # The two matrix products round their input differently, in proportion to the logits.
        return self._within(difference, "logits", self._rounding * float(all_logits.std()) / _LOGIT_STD)

    def generates(self) -> Outcome:
        first = self._text(self._n_longest)
        other = self._text(self._n_longest // 2, 9)
        again = np.concatenate([first[: self._n_longest // 2], other[: self._n_longest // 4]])
        largest = 0.0
        for ids in (first, other, again):  # the last reuses the cached beginning of the first
            largest = max(largest, self._generation_difference(np.concatenate([self._bos, ids])))
        return self._within(largest, "nats per token")

    # --- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _exact(self) -> bool:
        """Whether results are bit-identical for any order and number of candidates (docs/engine.md, What holds)."""
        return self.scorer.backend == "cpu"

    @cached_property
    def _rounding(self) -> float:
        floats = all(part.type in FLOATS for part in self.scorer.weight_formats)
        return ROUNDING_FLOAT if floats else ROUNDING_QUANTIZED

    @cached_property
    def _stock(self) -> NDArray[np.int32]:
        return np.concatenate([self.scorer.tokenize(text, add_bos=False) for text in TEXTS[:4]])

    @cached_property
    def _labels(self) -> NDArray[np.int32]:
        return np.unique(self._stock)[:: max(1, len(np.unique(self._stock)) // 4)][:4]

    @cached_property
    def _candidates(self) -> NDArray[np.float32]:
        noise = np.random.default_rng(0).standard_normal((5, self._n_rows, self.scorer.n_embd))
        return (self.scorer.embedding_std * noise).astype(np.float32)

    @property
    def _no_rows(self) -> NDArray[np.float32]:
        return np.empty((1, 0, self.scorer.n_embd), dtype=np.float32)

    def _text(self, n: int, start: int = 0) -> NDArray[np.int32]:
        """``n`` tokens of text, or fewer if the context is too small."""
        n = max(self._n_rows + 1, min(n, self._n_longest))
        return np.resize(np.roll(self._stock, -start), n)

    def _score(
        self,
        texts: Sequence[NDArray[np.int32]],
        embeds: NDArray[np.float32],
        label_ids: NDArray[np.int32] | None = None,
        placement: Placement = "front",
    ) -> NDArray[np.float32]:
        return self.scorer.score_with_soft_prompt(texts, embeds, label_ids, placement, self._bos)

    def _repeats(self, placement: Placement) -> tuple[Outcome, float]:
        """The outcome, and by how much a text's logits differ between scored alone and with other texts."""
        texts = [self._text(_SCORED_TOKENS), self._text(5, 3), self._text(_SCORED_TOKENS // 2, 7)]
        embeds = self._candidates

        def score(texts: Sequence[NDArray[np.int32]], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
            return self._score(texts, embeds, self._labels, placement)

        together = score(texts, embeds)
        if not np.isfinite(together).all():
            return (False, f"{placement}: logits are NaN or infinite"), 0.0
        cases: list[tuple[str, Callable[[], NDArray[np.float32]], NDArray[np.float32]]] = [
            ("in another order of candidates", lambda: score(texts, embeds[::-1]), together[::-1]),
            ("with a single candidate", lambda: score(texts, embeds[2:3]), together[2:3]),
            ("after other calls", lambda: score(texts, embeds[:2]), together[:2]),
        ]
        for case, again, expected in cases:
            difference = _distance(again(), expected)
            if difference > (0.0 if self._exact else self._rounding):
                return (False, f"{placement}: logits differ by {difference:.2g} {case}"), difference
        separate = np.concatenate([score([text], embeds[:2]) for text in texts], axis=1)
        difference = _distance(separate, together[:2])
        # With the prompt in the cue, each text is computed by itself if attention is per row; in front, texts share
        # graphs.
        exact = self._exact and placement == "cue" and self.scorer.shares_beginnings
        if difference > (0.0 if exact else self._rounding):
            problem = f"{placement}: logits of a text differ by {difference:.2g} when scored with other texts"
            return (False, problem), difference
        return (True, ""), difference

    def _generation_difference(self, ids: NDArray[np.int32]) -> float:
        """Largest difference of generated tokens' log-probabilities from scoring, in nats per token."""
        stream = self.scorer.generator.open(Placed(ids), Sampling())
        tokens = [stream.next() for _ in range(self._n_new)]
        stream.cancel()
        beginnings = [[token.id for token in tokens[:n]] for n in range(1, len(tokens) + 1)]
        plan = self.scorer.compile([ids], continuations=[beginnings], keep_kv=False)
        scored = plan.score(self._no_rows)[0, 0]
        generated = np.cumsum([token.log_prob for token in tokens])
        return float(np.max(np.abs(generated - scored) / np.arange(1, len(tokens) + 1)))

    def _within(self, difference: float, unit: str, tolerance: float | None = None) -> Outcome:
        limit = self._rounding if tolerance is None else tolerance
        if not difference <= limit:
            return False, f"{unit}: differ by {difference:.2g}, more than the rounding of {limit:.2g}"
        return True, f"{unit}: {_described(difference)}"

    def _chats(self) -> bool:
        try:
            self.scorer.generator.chat_ids([("user", "Hello")])
        except InputError:
            return False
        return True


def _described(difference: float) -> str:
    return "the same bits" if difference == 0 else f"within {max(difference, 1e-6):.1g}"


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Largest absolute difference; infinite if a value is NaN or infinite."""
    difference = float(np.max(np.abs(a.astype(np.float64) - b)))
    return difference if math.isfinite(difference) else math.inf
