"""`LayerView`: rows under one template, read by a model's layers instead of its next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.engine.layers import normalized
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ScoringInterrupted
from fedbpt.objective.losses import log_probabilities
from fedbpt.objective.mini_batches import rows_together
from fedbpt.protocol.specs import LayerReadout, PromptSpec, Template
from fedbpt.search.projection import placing
from fedbpt.tasks.task import bos_ids, cue_ids, head_ids, label_word_ids, render_ids

Floats = NDArray[np.float64]
States = NDArray[np.float32]
NoStop = Callable[[], bool]

IN_CUE = PromptSpec(d=1)
"""The place of no prompt: texts then share the KV of their beginnings with the same texts under other templates."""


ViewKey: TypeAlias = tuple[Template, bool, tuple[int, ...], bytes]
"""Which view of a text: its template, whether label words are scored, layers, and the prompt's rows."""


class Views:
    """What a reading of n rows found.

    ``states``: float16 [n, n_views, n_layers, n_embd], each over its root mean square. ``words``: float64 [n,
    n_word_views, n_labels], log-probabilities of the label words, over the labels, of the first views.
    """

    def __init__(self, states: NDArray[np.float16], words: Floats) -> None:
        self.states = states
        self.words = words

    def reader(self, place: int) -> Floats:
        """States [n, n_embd] of the reader ``place``: views first, then layers."""
        n_layers = self.states.shape[2]
        return self.states[:, place // n_layers, place % n_layers].astype(np.float64)


def in_reading_order(templates: Sequence[Template]) -> list[int]:
    """Indices of ``templates`` such that those with the same head follow each other: texts' KV is then reused."""
    return sorted(range(len(templates)), key=lambda i: templates[i].pattern.partition("{text}")[0])


class LayerView:
    """Reads texts under ``template``.

    Args:
        labels: label names, one per label word; empty: the label words are not scored.
        max_text_tokens: longer texts are cut; so are those too long for the model's context under this template.
        layers: ascending.
        rows, placement of the prompt [n_prompt, n_embd]: float32; None: no prompt.
    """

    def __init__(
        self,
        scorer: Scorer,
        template: Template,
        labels: tuple[str, ...],
        max_text_tokens: int,
        layers: tuple[int, ...],
        rows: NDArray[np.float32] | None = None,
        placement: PromptSpec = IN_CUE,
    ) -> None:
        self.tokens = 0
        """Forward tokens computed so far."""
        self.scorer = scorer
        self.template = template
        self._layers = layers
        self._embeds = (np.zeros((0, scorer.n_embd), np.float32) if rows is None else rows)[None]
        where = IN_CUE if rows is None else placement
        self._placing = placing(where)
        self._follows_bos = where.placement == "front"
        self._words = label_word_ids(scorer, template, labels) if labels else []
        around = len(head_ids(scorer, template)) + len(cue_ids(scorer, template))
        around += max((len(word) - 1 for word in self._words), default=0)
        around += self._embeds.shape[1] if where.in_front else 0
        self._limit = min(max_text_tokens, max(scorer.n_ctx_train - around, 1))

    @property
    def scores_words(self) -> bool:
        return bool(self._words)

    def read(self, texts: Sequence[str]) -> tuple[States, Floats]:
        """States [n, n_layers, n_embd] of ``texts`` as the model has them, and the label words' log-probabilities."""
        ids = [render_ids(self.scorer, self.template, text, self._limit) for text in texts]
        prefix = None
        if self._follows_bos and (n_bos := len(bos_ids(self.scorer))):
            prefix = ids[0][:n_bos]
            ids = [each[n_bos:] for each in ids]
        follow = [self._words] * len(ids) if any(len(word) > 1 for word in self._words) else None
        first: ArrayLike = [] if follow or not self._words else np.concatenate(self._words)
        plan = self.scorer.compile(
            ids,
            first,
            prefix=prefix,
            continuations=follow,
            layers=self._layers,
            keep_kv=False,
            **self._placing,
        )
        logits, states = plan.score_states(self._embeds)
        self.tokens += plan.n_tokens
        return states[0], log_probabilities(logits[0].astype(np.float64))


def read_views(
    views: Sequence[LayerView],
    texts: Sequence[str],
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    cancelled: NoStop = lambda: False,
) -> Views:
    """Read ``texts`` under each of ``views``. Raises `ScoringInterrupted` once ``cancelled`` returns True.

    A few texts at a time, under one template after the other, so that the model's KV of their beginnings is reused.
    """
    states = []
    words = []
    together = rows_together(views[0].scorer)
    order = in_reading_order([view.template for view in views])
    for start in range(0, len(texts), together):
        if cancelled():
            raise ScoringInterrupted(f"reading was cancelled after {start} of {len(texts)} texts")
        read = {place: views[place].read(texts[start : start + together]) for place in order}
        found = [read[place] for place in range(len(views))]
        states.append(np.stack([normalized(each) for each, _ in found], axis=1).astype(np.float16))
        scored = [each for _, each in found if each.shape[1]]
        words.append(np.stack(scored, axis=1) if scored else np.zeros((len(found[0][1]), 0, 0)))
        progress(min(start + together, len(texts)), len(texts))
    return Views(np.concatenate(states), np.concatenate(words))


class LayerReader:
    """Reads label logits by a `LayerReadout`.

    Args:
        readout: how.
        scorer: the model.
        template: the readout's first template.
        labels: label names.
        max_text_tokens: longer texts are cut.
        rows, placement: of the prompt under ``template``; None: no prompt.
    """

    def __init__(
        self,
        readout: LayerReadout,
        scorer: Scorer,
        template: Template,
        labels: tuple[str, ...],
        max_text_tokens: int,
        rows: NDArray[np.float32] | None = None,
        placement: PromptSpec = IN_CUE,
    ) -> None:
        self._weights = readout.weights.numpy()
        self._scales = readout.word_scales.numpy()
        self._bias = readout.bias.numpy()
        self._views: dict[int, tuple[ViewKey, LayerView]] = {}
        templates = (template, *readout.others)
        for place in in_reading_order(templates):
            if place not in readout.places_read:
                continue
            scored = labels if self._scales[place] else ()
            own = rows if place == 0 else None
            view = LayerView(scorer, templates[place], scored, max_text_tokens, readout.layers, own, placement)
            key = (templates[place], bool(scored), readout.layers, b"" if own is None else own.tobytes())
            self._views[place] = key, view

    def logits(self, texts: Sequence[str], known: dict[ViewKey, tuple[States, Floats]] | None = None) -> Floats:
        """Label logits [n, n_labels] of a few ``texts``: more than `rows_together` share less.

        ``known``: what other readers have read of the same texts; this reader's views are added.
        """
        shared = {} if known is None else known
        found: Floats = np.repeat(self._bias[None], len(texts), axis=0)
        for place, (key, view) in self._views.items():
            if key not in shared:
                shared[key] = view.read(texts)
            states, words = shared[key]
            found += np.einsum("nle,lek->nk", normalized(states), self._weights[place])
            if self._scales[place]:
                found += self._scales[place] * words
        return found
