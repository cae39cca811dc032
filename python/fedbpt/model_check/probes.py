"""Questions to a loaded model whose answers must agree with each other, whatever the model is.

They find what a wrong graph, a wrong vocabulary or a kernel that rounds by its batch would show. That the numbers are
those of the model's makers is another question: docs/models.md says for which architectures it was asked.
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
    "<s> <|im_end|> </s> [INST] <bos>",  # names of control tokens in a text are text
)

FLOATS = ("f32", "f16", "bf16")
ROUNDING_FLOAT = 0.02
ROUNDING_QUANTIZED = 0.15
"""By how much a logit, or a token's log-probability in nats, may move where a token is computed in another batch: with
quantised weights activations are rounded to 8 bits, so that a last bit may grow."""

_SPREAD = 3.0  # standard deviation of logits for which that holds
_LONGEST = 48  # tokens of a text: a few seconds for a small model
_SCORED = 16

Answer = tuple[bool, str]
"""Whether it holds, and what was found."""


class Probes:
    """The questions, each a method that says whether it holds."""

    def __init__(self, scorer: NativeScorer) -> None:
        self.scorer = scorer
        self._bos = scorer.tokenize("")
        room = scorer.n_ctx_train - len(self._bos)
        self._n_rows = max(1, min(4, room // 4))
        self._n_new = max(1, min(4, room // 4))
        self._n_longest = min(_LONGEST, room - self._n_rows - self._n_new)

    @cached_property
    def facts(self) -> ModelFacts:
        """What the model is."""
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

    def tokenizes(self) -> Answer:
        for text in TEXTS:
            pieces = b"".join(self.scorer.generator.piece(int(token)) for token in self.scorer.tokenize(text, False))
            if pieces.removeprefix(b" ") != text.encode():  # SentencePiece puts a blank before a text
                return False, f"{text!r} comes back as {pieces.decode(errors='backslashreplace')!r}"
        return True, f"{len(TEXTS)} texts"

    def repeats(self) -> Answer:
        worst = 0.0
        for placement in ("front", "cue"):
            answer, moved = self._repeats(placement)
            if not answer[0]:
                return answer
            worst = max(worst, moved)
        candidates = "the same bits" if self._exact else "the same but for rounding"
        return True, f"candidates: {candidates}; texts: {_written(worst)}"

    def rows(self) -> Answer:
        ids, n = self._text(_SCORED), self._n_rows
        plain = self._score([ids], self._no_rows)
        front = self._score([ids[n:]], self.scorer.token_embeddings(ids[:n])[None])
        cue = self._score([ids], self.scorer.token_embeddings(ids[-n:])[None], placement="cue")
        return self._within(max(_distance(front, plain), _distance(cue, plain)), "logits")

    def labels(self) -> Answer:
        texts, embeds = [self._text(_SCORED), self._text(_SCORED // 2, 5)], self._candidates[:1]
        wide = self._score(texts, embeds)
        moved = _distance(self._score(texts, embeds, self._labels), wide[..., self._labels])
        # the whole layer rounds what it reads, which shows in proportion to the logits
        return self._within(moved, "logits", self._rounding * float(wide.std()) / _SPREAD)

    def generates(self) -> Answer:
        first, other = self._text(self._n_longest), self._text(self._n_longest // 2, 9)
        again = np.concatenate([first[: self._n_longest // 2], other[: self._n_longest // 4]])
        worst = 0.0
        for ids in (first, other, again):  # the last goes on from what is kept of the first
            worst = max(worst, self._generated_apart(np.concatenate([self._bos, ids])))
        return self._within(worst, "nats a token")

    # --- what they are made of ---------------------------------------------------------------------------------------

    @property
    def _exact(self) -> bool:
        """Whether the order and number of candidates move no bit (docs/engine.md, What holds)."""
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
        """Tokens of a text, as many as the context has room for."""
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

    def _repeats(self, placement: Placement) -> tuple[Answer, float]:
        """Whether it holds, and how far a text's logits move with the texts beside it."""
        texts, embeds = [self._text(_SCORED), self._text(5, 3), self._text(_SCORED // 2, 7)], self._candidates

        def score(texts: Sequence[NDArray[np.int32]], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
            return self._score(texts, embeds, self._labels, placement)

        together = score(texts, embeds)
        if not np.isfinite(together).all():
            return (False, f"{placement}: logits that are no numbers"), 0.0
        company: list[tuple[str, Callable[[], NDArray[np.float32]], NDArray[np.float32]]] = [
            ("in another order of candidates", lambda: score(texts, embeds[::-1]), together[::-1]),
            ("with one candidate alone", lambda: score(texts, embeds[2:3]), together[2:3]),
            ("after other calls", lambda: score(texts, embeds[:2]), together[:2]),
        ]
        for what, again, expected in company:
            moved = _distance(again(), expected)
            if moved > (0.0 if self._exact else self._rounding):
                return (False, f"{placement}: logits move by {moved:.2g} {what}"), moved
        alone = np.concatenate([score([text], embeds[:2]) for text in texts], axis=1)
        moved = _distance(alone, together[:2])
        # texts in the cue are computed alone, where attention goes row by row; in front they share graphs
        exact = self._exact and placement == "cue" and self.scorer.shares_beginnings
        if moved > (0.0 if exact else self._rounding):
            return (False, f"{placement}: logits of a text move by {moved:.2g} with the texts beside it"), moved
        return (True, ""), moved

    def _generated_apart(self, ids: NDArray[np.int32]) -> float:
        """How far generated tokens' log-probabilities are from what scoring gives, nats a token."""
        stream = self.scorer.generator.open(Placed(ids), Sampling())
        tokens = [stream.next() for _ in range(self._n_new)]
        stream.cancel()
        beginnings = [[token.id for token in tokens[:n]] for n in range(1, len(tokens) + 1)]
        plan = self.scorer.compile([ids], continuations=[beginnings], keep_kv=False)
        scored = plan.score(self._no_rows)[0, 0]
        generated = np.cumsum([token.log_prob for token in tokens])
        return float(np.max(np.abs(generated - scored) / np.arange(1, len(tokens) + 1)))

    def _within(self, moved: float, of_what: str, rounding: float | None = None) -> Answer:
        most = self._rounding if rounding is None else rounding
        if not moved <= most:
            return False, f"{of_what}: {moved:.2g} apart, up to {most:.2g} is rounding"
        return True, f"{of_what}: {_written(moved)}"

    def _chats(self) -> bool:
        try:
            self.scorer.generator.chat_ids([("user", "Hello")])
        except InputError:
            return False
        return True


def _written(moved: float) -> str:
    return "the same bits" if moved == 0 else f"within {max(moved, 1e-6):.1g}"


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Infinite where there are no numbers to compare."""
    moved = float(np.max(np.abs(a.astype(np.float64) - b)))
    return moved if math.isfinite(moved) else math.inf
