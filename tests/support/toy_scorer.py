"""A tiny deterministic stand-in for a language model, in numpy: bytes in, logits out.

It satisfies the `fedbpt.engine.scorer.Scorer` protocol. Every (candidate, text) pair is computed separately, so a
result does not depend on the rest of the call. ``calls`` records the shapes of each call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.engine.text_generator import Answer
from fedbpt.errors import InputError
from fedbpt.models import WeightFormat
from fedbpt.protocol.specs import Placement
from tests.support.toy_generator import ToyGenerator

BOS = 256


class ToyScorer:
    """Byte tokens with BOS 256. A tanh layer reads a text's last embedding and the mean of all of them.

    Args:
        seed: seed of the weights; scorers with equal arguments are the same model.
        n_embd: embedding width.
        n_ctx: longest sequence, prompt included.
        name: the model's name.
    """

    n_vocab = 257
    n_layer = 2
    architecture = "toy"
    backend = "numpy"
    n_threads = 1
    weight_formats = (WeightFormat("f32", 1000, 4000),)
    hint: str | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, seed: int = 0, n_embd: int = 8, n_ctx: int = 512, name: str = "toy") -> None:
        rng = np.random.default_rng(seed)
        self.name = name
        self.n_embd = n_embd
        self.n_ctx = n_ctx
        self._table = (0.3 * rng.standard_normal((self.n_vocab, n_embd))).astype(np.float32)
        self._mix = rng.standard_normal((n_embd, 16)) * 0.8
        self._own = rng.standard_normal((n_embd, 16)) * 1.2
        self._head = rng.standard_normal((16, self.n_vocab)) * 0.7
        self.calls: list[tuple[int, int]] = []

    @property
    def fingerprint(self) -> str:
        return "sha256:" + hashlib.sha256(self._table.tobytes()).hexdigest()

    shares_beginnings = False

    @property
    def n_ctx_train(self) -> int:
        return self.n_ctx

    @property
    def embedding_std(self) -> float:
        return float(self._table.std())

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        body = list(text.encode())
        return np.array(body if add_bos is False else [BOS, *body], dtype=np.int32)

    def token_embeddings(self, ids: ArrayLike) -> NDArray[np.float32]:
        return self._table[self._checked(ids)].copy()

    def score_with_soft_prompt(
        self,
        tokens: Sequence[ArrayLike],
        embeds: ArrayLike,
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        candidates = np.asarray(embeds, dtype=np.float32)
        if candidates.ndim == 2:
            candidates = candidates[None]
        if candidates.ndim != 3 or candidates.shape[2] != self.n_embd:
            raise InputError(f"embeds must have shape [k, n_prompt, {self.n_embd}], got {list(candidates.shape)}")
        if not np.isfinite(candidates).all():
            raise InputError("embeds hold NaN or infinity")
        head = self._table[self._checked([] if prefix is None else prefix)]
        texts = [self._table[self._checked(ids)] for ids in tokens]
        labels = np.arange(self.n_vocab) if label_ids is None else self._checked(label_ids)
        logits = np.empty((len(candidates), len(texts), len(labels)), dtype=np.float32)
        for c, rows in enumerate(candidates):
            for t, text in enumerate(texts):
                logits[c, t] = self._forward(self._join(head, rows, text, placement))[labels]
        self.calls.append((len(candidates), len(texts)))
        return logits

    def compile(
        self,
        texts: Sequence[ArrayLike],
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: ArrayLike | None = None,
        cue: ArrayLike | None = None,
        *,
        continuations: Sequence[Sequence[ArrayLike]] | None = None,
        layers: Sequence[int] | None = None,
        keep_kv: bool = True,
    ) -> ToyPlan:
        after = np.asarray([] if cue is None else cue, dtype=np.int32)
        tokens = [np.concatenate([np.asarray(ids), after]) for ids in texts]
        return ToyPlan(self, tokens, label_ids, placement, prefix, continuations, layers or (), keep_kv)

    def log_probabilities(
        self,
        texts: list[NDArray[np.intp]],
        embeds: ArrayLike,
        continuations: Sequence[Sequence[ArrayLike]],
        placement: Placement,
        prefix: ArrayLike | None,
    ) -> NDArray[np.float32]:
        head = self._table[self._checked([] if prefix is None else prefix)]
        found = np.zeros((len(np.asarray(embeds)), len(texts), len(continuations[0])), dtype=np.float32)
        for c, rows in enumerate(np.asarray(embeds, dtype=np.float32)):
            for t, text in enumerate(texts):
                sequence = self._join(head, rows, self._table[self._checked(text)], placement)
                for k, ids in enumerate(continuations[t]):
                    so_far = sequence
                    for token in self._checked(ids):
                        logits = self._forward(so_far)
                        top = logits.max()
                        found[c, t, k] += logits[token] - top - np.log(np.exp(logits - top).sum())
                        so_far = np.concatenate([so_far, self._table[[token]]])
        return found

    def states(
        self,
        texts: list[NDArray[np.intp]],
        embeds: ArrayLike,
        layers: Sequence[int],
        placement: Placement,
        prefix: ArrayLike | None,
    ) -> NDArray[np.float32]:
        """[n_candidates, n, n_layers, n_embd]: layer 0 has the last token and the mean, 1 the hidden layer."""
        head = self._table[self._checked([] if prefix is None else prefix)]
        candidates = np.asarray(embeds, dtype=np.float32)
        found = np.zeros((len(candidates), len(texts), len(layers), self.n_embd), dtype=np.float32)
        for c, rows in enumerate(candidates):
            for t, text in enumerate(texts):
                values = self._join(head, rows, self._table[self._checked(text)], placement).astype(np.float64)
                every = (values.mean(axis=0) + 0.1 * values[-1], self._hidden(values)[: self.n_embd])
                found[c, t] = [every[layer] for layer in layers]
        return found

    @cached_property
    def generator(self) -> ToyGenerator:
        return ToyGenerator(self)

    def logits_after(self, ids: Sequence[int], rows: NDArray[np.float32], rows_at: int) -> NDArray[np.float64]:
        """Logits [n_vocab] after ``ids``, with ``rows`` in place of the embeddings from ``rows_at`` on."""
        values = self._table[self._checked(ids)]
        if len(rows):
            values[rows_at : rows_at + len(rows)] = rows
        return self._forward(values)

    def interrupt(self) -> None:
        """Do nothing: calls are short."""

    def memory(self) -> Mapping[str, int]:
        size = self._table.nbytes
        return {"weights": size, "kv": 0, "compute": 0, "rss": size, "peak_rss": size}

    def _join(
        self, head: NDArray[np.float32], rows: NDArray[np.float32], text: NDArray[np.float32], placement: Placement
    ) -> NDArray[np.float32]:
        if len(text) == 0:
            raise InputError("a text is empty")
        if placement == "front":
            joined = np.concatenate([head, rows, text])
        elif len(rows) > len(text):
            raise InputError(f"a text of {len(text)} tokens is shorter than the prompt's {len(rows)}")
        else:
            joined = np.concatenate([head, text[: len(text) - len(rows)], rows])
        if len(joined) > self.n_ctx:
            raise InputError(f"a text of {len(joined)} tokens is longer than the context of {self.n_ctx}")
        return joined

    def _hidden(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        context = np.tanh(values @ self._mix).mean(axis=0)
        return np.asarray(np.tanh(2.0 * context + values[-1] @ self._own))

    def _forward(self, sequence: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(self._hidden(sequence.astype(np.float64)) @ self._head)

    def _checked(self, ids: ArrayLike) -> NDArray[np.intp]:
        index = np.asarray(ids, dtype=np.intp)
        if index.ndim != 1 or (index.size and (index.min() < 0 or index.max() >= self.n_vocab)):
            raise InputError(f"token ids must be a list within 0..{self.n_vocab - 1}")
        return index


class ToyPlan:
    """Counts tokens as a real plan does: in the cue, the tokens before the rows are computed once."""

    def __init__(
        self,
        scorer: ToyScorer,
        texts: list[NDArray[np.intp]],
        label_ids: ArrayLike | None,
        placement: Placement,
        prefix: ArrayLike | None,
        continuations: Sequence[Sequence[ArrayLike]] | None,
        layers: Sequence[int],
        keep_kv: bool,
    ) -> None:
        self._continuations = continuations
        self._layers = layers
        self._keep_kv = keep_kv
        self._scorer = scorer
        self._texts = texts
        self._options = (label_ids, placement, prefix)
        self._seen: set[int] = set()
        self.n_tokens = 0

    @property
    def n_texts(self) -> int:
        return len(self._texts)

    def generate(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        _sampling: object = None,
        *,
        max_tokens: int = 64,  # noqa: ARG002 - as the protocol names them
        stop: Sequence[str] = (),  # noqa: ARG002
    ) -> list[list[Answer]]:
        """The same word for every text, unless a candidate's rows are large."""
        n = self.n_texts if indices is None else len(np.asarray(indices))
        none = np.zeros(0, dtype=np.int32)
        return [
            [Answer("large" if np.abs(rows).max(initial=0.0) > 1 else "small", none)] * n for rows in np.asarray(embeds)
        ]

    def score_states(
        self, embeds: ArrayLike, indices: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        chosen = range(self.n_texts) if indices is None else [int(i) for i in np.asarray(indices)]
        _, placement, prefix = self._options
        texts = [self._texts[i] for i in chosen]
        states = self._scorer.states(texts, embeds, self._layers, placement, prefix)
        return self.score(embeds, indices), states

    def score(self, embeds: ArrayLike, indices: ArrayLike | None = None) -> NDArray[np.float32]:
        chosen = range(self.n_texts) if indices is None else [int(i) for i in np.asarray(indices)]
        texts = [self._texts[i] for i in chosen]
        label_ids, placement, prefix = self._options
        logits = self._scorer.score_with_soft_prompt(texts, embeds, label_ids, placement, prefix)
        if self._continuations is not None:
            follow = [self._continuations[i] for i in chosen]
            found = self._scorer.log_probabilities(texts, embeds, follow, placement, prefix)
            logits = found if label_ids is None else np.concatenate([found, logits], axis=2)
        k, n_prompt = np.asarray(embeds).shape[:2]
        if self._continuations is not None:
            self.n_tokens += k * sum(len(np.asarray(ids)) - 1 for i in chosen for ids in self._continuations[i])
        if placement == "front":
            self.n_tokens += k * (n_prompt + sum(len(text) for text in texts))
        else:
            fresh = [i for i in chosen if i not in self._seen]
            self.n_tokens += k * n_prompt * len(texts) + sum(len(self._texts[i]) - n_prompt for i in fresh)
            self._seen.update(fresh if self._keep_kv else ())
        return logits
