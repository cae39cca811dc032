"""How bad a soft prompt is on labelled texts: cross-entropy or hinge over the label words, in mini-batches.

The perturbed ratio is FedBPT's (Sun et al. 2023, arXiv 2310.01467, section 3.3): F(z) = L(z; D) / L(z; D̃), where D̃ is
D with text tokens replaced at random; a prompt that answers the same whatever the text says gains nothing by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.errors import DataError, InputError, ScoringInterrupted, TaskError
from fedbpt.messages import LossName, ObjectiveSpec, PromptSpec, Template
from fedbpt.projection import Projection
from fedbpt.prompt import Prompt
from fedbpt.racing import Race, race
from fedbpt.scorer import Plan, Scorer
from fedbpt.seeding import generator
from fedbpt.tasks.perturb import perturb
from fedbpt.tasks.task import cue_ids, label_ids, render_ids

HINGE_MARGIN = 2.0
"""Margin of the hinge loss, as in Black-Box Tuning (arXiv 2201.03514)."""

CHUNK = 64
"""Texts per scoring call. Fixed: how texts share a call may show in the last bits of a quantised model's logits."""

_SMALLEST_LOSS = 1e-12  # a perturbed loss of zero (hinge) must not divide

Row = tuple[str, int]
Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]


# --- losses --------------------------------------------------------------------------------------------------------


def cross_entropy(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """−log p(target) in nats, over the label words alone: logits [..., n, n_labels], targets [n] → [..., n]."""
    values, index = _checked(logits, targets)
    shifted = values - values.max(axis=-1, keepdims=True)
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=-1)) - _at(shifted, index)
    return losses


def hinge(logits: ArrayLike, targets: ArrayLike, margin: float = HINGE_MARGIN) -> NDArray[np.float64]:
    """Σ over wrong labels j of max(0, margin + logit_j − logit_target): logits [..., n, n_labels] → [..., n]."""
    values, index = _checked(logits, targets)
    over = np.maximum(0.0, values - _at(values, index)[..., None] + margin)
    losses: NDArray[np.float64] = over.sum(axis=-1) - margin  # the target's own term is the margin
    return losses


LOSSES: Mapping[LossName, Callable[[ArrayLike, ArrayLike], NDArray[np.float64]]] = {
    "cross_entropy": cross_entropy,
    "hinge": hinge,
}


def _checked(logits: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    values = np.asarray(logits, dtype=np.float64)
    index = np.asarray(targets, dtype=np.intp)
    if values.ndim < 2 or index.shape != (values.shape[-2],):
        raise InputError(
            f"logits [..., n, n_labels] and targets [n] disagree: {list(values.shape)}, {list(index.shape)}"
        )
    if index.size and not (index.min() >= 0 and index.max() < values.shape[-1]):
        raise InputError(f"targets must lie in 0..{values.shape[-1] - 1}")
    return values, index


def _at(values: NDArray[np.float64], index: NDArray[np.intp]) -> NDArray[np.float64]:
    """values[..., i, index[i]]."""
    return values[..., np.arange(len(index)), index]


# --- measuring prompts on rows ---------------------------------------------------------------------------------------


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """How k prompts did on n rows. ``predictions`` int [k, n] are label indices; losses are nats (or hinge units)."""

    n: int
    correct: tuple[int, ...]
    loss_sums: tuple[float, ...]
    predictions: NDArray[np.intp]

    @property
    def accuracy(self) -> tuple[float, ...]:
        return tuple(c / self.n for c in self.correct)


class Objective:
    """Labelled rows, encoded once for one model, template and prompt place.

    Args:
        scorer: the model.
        template: how a text is put to it.
        labels: label names, one per label word.
        rows: (text, label index) pairs.
        objective: which loss; mini-batches are the caller's (`batch_indices`).
        prompt: where the prompt goes and how long it is.
        label_bias: [n_labels] added to the label logits; None: zeros.
        keep_kv: False where the rows are scored once: their KV is not kept.

    Raises:
        TaskError: label words that share a token; a cue shorter than the prompt.
        DataError: no rows, a label out of range.
        InputError: an empty text.
    """

    def __init__(
        self,
        scorer: Scorer,
        template: Template,
        labels: tuple[str, ...],
        rows: Sequence[Row],
        objective: ObjectiveSpec,
        prompt: PromptSpec,
        label_bias: ArrayLike | None = None,
        keep_kv: bool = True,
    ) -> None:
        if not rows:
            raise DataError("there are no rows to score: give at least one")
        self.scorer = scorer
        self.template = template
        self.labels = tuple(labels)
        self.spec = objective
        self.label_ids = label_ids(scorer, template, self.labels)
        self.label_bias = np.zeros(len(labels)) if label_bias is None else np.array(label_bias, dtype=np.float64)
        if self.label_bias.shape != (len(labels),) or not np.isfinite(self.label_bias).all():
            raise InputError(f"label_bias must be {len(labels)} finite numbers")
        self.targets = _targets(rows, self.labels)
        self._cue = np.asarray(cue_ids(scorer, template), dtype=np.int32)
        n_bos = len(scorer.tokenize("x")) - len(scorer.tokenize("x", add_bos=False))
        texts = [render_ids(scorer, template, text, objective.max_text_tokens) for text, _ in rows]
        # In front, the prompt goes between BOS and the text; in the cue, the text keeps its own BOS.
        self._prefix = texts[0][:n_bos] if prompt.placement == "front" and n_bos else None
        self._tokens = [text[n_bos:] if self._prefix is not None else text for text in texts]
        self._prompt = prompt
        self._plan = self._compile(self._tokens, keep_kv)
        self.projection = Projection(prompt, _start(scorer, self._cue, prompt), scorer.embedding_std)
        self._zero_shot = np.full(len(texts), np.nan)
        self.evaluations = 0
        """Candidates scored so far."""
        self.tokens = 0
        """Forward tokens computed so far; a text that the prompt follows counts once, while its plan keeps its KV."""

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def prompt(self) -> PromptSpec:
        return self._prompt

    def embeds(self, latents: ArrayLike) -> NDArray[np.float32]:
        """Soft prompts [k, n_prompt, n_embd] of latents [k, d]; z = 0 in the cue is exactly the zero-shot model."""
        return self.projection.embeds(latents)

    def zero_shot_embeds(self) -> NDArray[np.float32]:
        """The one "candidate" that leaves the model as it is: the cue's own rows, or no row at all in front."""
        rows = self.projection.p0
        return rows[None] if self.prompt.placement == "cue" else rows[None, :0]

    def losses(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        rng: np.random.Generator | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> NDArray[np.float64]:
        """Mean loss [k] of each candidate over these rows; the perturbed ratio where ``spec.perturb`` > 0.

        Args:
            embeds: [k, n_prompt, n_embd].
            indices: rows to use; None: all.
            rng: replaces the tokens of the perturbed copy; needed where ``spec.perturb`` > 0.
            progress: called with (rows done, rows in all) after each scoring call.
            cancelled: asked before each scoring call.

        Raises:
            ScoringInterrupted: ``cancelled`` said yes.
        """
        chosen = self._indices(indices)
        rate = self.spec.perturb
        passes = 2 if rate > 0 else 1
        sums = []
        for step in range(passes):
            report = _shifted(progress, step * len(chosen), passes * len(chosen))
            replaced = self._perturbed(chosen, rate, rng) if step == 1 else None
            total = np.zeros(len(np.asarray(embeds)))
            for _, loss in self._scored(embeds, chosen, replaced, report, cancelled):
                total += loss.sum(axis=1)
            sums.append(total)
        self.evaluations += len(total)
        return sums[0] / len(chosen) if passes == 1 else sums[0] / np.maximum(sums[1], _SMALLEST_LOSS)

    def race(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        *,
        n_better: int,
        cancelled: Cancelled | None = None,
    ) -> Race:
        """Losses of which the ``n_better`` smallest are right: other candidates stop early (`fedbpt.racing`).

        Rows go by the loss of the model without prompt, the largest first; it is computed once for each row.
        With fewer than `racing.MIN_TEXTS` rows the result is that of `losses` to the last bit. With more, a candidate
        that was scored on all rows has their mean, up to rounding: the rows are scored in other calls, and which rows
        share a call shows in the last bits of their logits, or in more where activations are quantised.

        Args:
            embeds: [k, n_prompt, n_embd].
            indices: rows to use; None: all.
            n_better: how many of the best candidates to keep right; half the population for CMA-ES.
            cancelled: asked before each scoring call.

        Raises:
            InputError: ``n_better`` outside 1…k; a perturbed objective, which is no mean over rows.
            ScoringInterrupted: ``cancelled`` said yes.
        """
        if self.spec.perturb > 0:
            raise InputError("a perturbed objective is a ratio and cannot be raced: set perturb to 0 or use losses")
        candidates = np.asarray(embeds, dtype=np.float32)
        chosen = self._indices(indices)

        def score(who: NDArray[np.intp], texts: NDArray[np.intp]) -> NDArray[np.float64]:
            parts = self._scored(candidates[who], chosen[texts], None, None, cancelled)
            return np.concatenate([loss for _, loss in parts], axis=1)

        found = race(
            score, lambda: self._zero_shot_losses(chosen, cancelled), len(candidates), len(chosen), n_better=n_better
        )
        self.evaluations += len(candidates)
        return found

    def evaluate(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Evaluation:
        """Count what each candidate gets right. Arguments and errors as for `losses`; never perturbed."""
        chosen = self._indices(indices)
        predictions, loss_sums = [], np.zeros(len(np.asarray(embeds)))
        for logits, loss in self._scored(embeds, chosen, None, progress, cancelled):
            predictions.append(logits.argmax(axis=-1))
            loss_sums += loss.sum(axis=1)
        self.evaluations += len(loss_sums)
        labels = np.concatenate(predictions, axis=1)
        right = (labels == self.targets[chosen]).sum(axis=1)
        return Evaluation(
            n=len(chosen),
            correct=tuple(int(count) for count in right),
            loss_sums=tuple(float(total) for total in loss_sums),
            predictions=labels,
        )

    def as_prompt(self, latent: ArrayLike, task_name: str, history: tuple[Mapping[str, Any], ...] = ()) -> Prompt:
        """The artefact of one latent [d]."""
        return Prompt(
            rows=self.embeds(np.asarray(latent, dtype=np.float64)[None])[0],
            spec=self.prompt,
            task_name=task_name,
            labels=self.labels,
            template=self.template,
            model_fingerprint=self.scorer.fingerprint,
            model_name=self.scorer.name,
            architecture=self.scorer.architecture,
            history=history,
            label_bias=self.label_bias,
        )

    def _indices(self, indices: ArrayLike | None) -> NDArray[np.intp]:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.intp)
        if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= len(self):
            raise InputError(f"row indices must be a non-empty list within 0..{len(self) - 1}")
        return chosen

    def _perturbed(
        self, chosen: NDArray[np.intp], rate: float, rng: np.random.Generator | None
    ) -> list[NDArray[np.int32]]:
        if rng is None:
            raise InputError("the perturbed objective needs a random generator: pass rng")
        keep = len(self._cue)
        return [perturb(self._tokens[i], keep, rate, self.scorer.n_vocab, rng) for i in chosen]

    def _zero_shot_losses(self, chosen: NDArray[np.intp], cancelled: Cancelled | None) -> NDArray[np.float64]:
        """Loss [n] of the model without prompt; a text a call, so that it depends on no other and no earlier call."""
        for i in np.unique(chosen[np.isnan(self._zero_shot[chosen])]):
            for _, loss in self._scored(self.zero_shot_embeds(), np.array([i]), None, None, cancelled):
                self._zero_shot[i] = loss[0, 0]
        return self._zero_shot[chosen]

    def _scored(
        self,
        embeds: ArrayLike,
        chosen: NDArray[np.intp],
        replaced: list[NDArray[np.int32]] | None,
        progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Logits [k, n, n_labels] and losses [k, n] of one chunk of rows after another, all candidates at once."""
        candidates = np.asarray(embeds, dtype=np.float32)
        if candidates.ndim != 3:
            raise InputError(f"embeds must have shape [k, n_prompt, n_embd], got {list(candidates.shape)}")
        for start in range(0, len(chosen), CHUNK):
            if cancelled is not None and cancelled():
                raise ScoringInterrupted(f"scoring was cancelled after {start} of {len(chosen)} texts")
            part = chosen[start : start + CHUNK]
            if replaced is None:
                plan, which = self._plan, part
            else:
                texts = replaced[start : start + CHUNK]
                plan, which = self._compile(texts, keep_kv=False), np.arange(len(texts))
            before = plan.n_tokens
            raw = plan.score(candidates, which)
            self.tokens += plan.n_tokens - before
            logits = np.asarray(raw, dtype=np.float64) + self.label_bias
            yield logits, LOSSES[self.spec.loss](logits, self.targets[part])
            if progress is not None:
                progress(start + len(part), len(chosen))

    def _compile(self, texts: list[NDArray[np.int32]], keep_kv: bool) -> Plan:
        return self.scorer.compile(texts, self.label_ids, self._prompt.placement, self._prefix, keep_kv=keep_kv)

    def __repr__(self) -> str:
        place = f"{self.prompt.n_prompt} x {self.prompt.placement}"
        return f"Objective({len(self)} rows, {len(self.labels)} labels, {self.spec.loss}, {place})"


def batch_indices(n_rows: int, batch_size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """A mini-batch without replacement, in ascending order; all rows where ``batch_size`` is 0 or too large."""
    if batch_size == 0 or batch_size >= n_rows:
        return np.arange(n_rows)
    return np.sort(rng.choice(n_rows, batch_size, replace=False))


def _start(scorer: Scorer, cue: NDArray[np.int32], prompt: PromptSpec) -> NDArray[np.float32]:
    """P0 [n_prompt, n_embd]: the cue's own last embeddings, or random tokens' in front of the text."""
    if prompt.placement == "front":
        ids = generator(prompt.seed, "p0").integers(0, scorer.n_vocab, prompt.n_prompt).astype(np.int32)
        return scorer.token_embeddings(ids)
    if prompt.n_prompt > len(cue):
        raise TaskError(
            f"n_prompt {prompt.n_prompt} is more than the answer cue's {len(cue)} tokens: "
            f"use n_prompt {len(cue)} at most, or a template with a longer cue"
        )
    return scorer.token_embeddings(cue[-prompt.n_prompt :])


def _targets(rows: Sequence[Row], labels: tuple[str, ...]) -> NDArray[np.intp]:
    for number, (_, label) in enumerate(rows):
        if not 0 <= label < len(labels):
            raise DataError(f"row {number} has label {label}, but there are {len(labels)} labels: {', '.join(labels)}")
    return np.array([label for _, label in rows], dtype=np.intp)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    report = progress
    return lambda done, _: report(before + done, total)
