"""`Objective`: the loss of soft prompts on labelled texts, in mini-batches.

The perturbed ratio is FedBPT's (Sun et al. 2023, arXiv 2310.01467, section 3.3): F(z) = L(z; D) / L(z; D̃), where D̃ is
D with text tokens replaced at random. It does not reward prompts whose predictions ignore the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from msgspec import UNSET
from numpy.typing import ArrayLike, NDArray

from fedbpt.engine.scorer import Plan, Scorer
from fedbpt.errors import DataError, InputError, ScoringInterrupted
from fedbpt.objective.answers import AnswerObjective
from fedbpt.objective.evaluation import Evaluation
from fedbpt.objective.losses import LOSSES, perturbed_ratio
from fedbpt.objective.readout import blocks, ensemble, word_ids
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import LayerReadout, ObjectiveSpec, PromptSpec, Readout, Template
from fedbpt.search.projection import Projection, placing, start_rows
from fedbpt.tasks.perturb import perturb
from fedbpt.tasks.rows import Row, targets_of
from fedbpt.tasks.task import Task, bos_ids, cue_ids, label_word_ids, render_ids, target_ids

CHUNK = 64
"""Texts per scoring call. Fixed, as the grouping of texts may change the last bits of a quantised model's logits."""

TIE = 0.01
"""Most that a target text's likelihood adds to the loss of an answer: it decides where the metric does not."""

Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]


def answer_loss(rewards: NDArray[np.float64], nll: NDArray[np.float64]) -> NDArray[np.float64]:
    """What answers of value ``rewards`` cost. ``nll``, of the target texts in nats, decides where they are equal."""
    likelihood = np.maximum(nll, 0.0)
    return 1.0 - rewards + TIE * likelihood / (1.0 + likelihood)


class Objective:
    """Labelled rows, encoded once for one model, template and prompt place.

    Args:
        scorer: the model.
        template: how a text is presented to the model.
        labels: label names, one per label word; empty: rows have target texts whose likelihood is maximised.
        rows: (text, label index) or (text, target text) pairs.
        objective: the loss; the caller chooses mini-batches (`fedbpt.tasks.rows`).
        prompt: placement and length of the prompt.
        keep_kv: False for a single pass over the rows: their KV is not kept.
        words: token ids [n_words] that a readout uses; None: ``objective.readout_words`` random ones of the run.

    Raises:
        TaskError: one label word is a prefix of another; a cue shorter than the prompt.
        DataError: no rows, a label out of range.
        InputError: an empty text, a text longer than the context, a loss that does not fit the task.
    """

    def __init__(
        self,
        scorer: Scorer,
        template: Template,
        labels: tuple[str, ...],
        rows: Sequence[Row],
        objective: ObjectiveSpec,
        prompt: PromptSpec,
        keep_kv: bool = True,
        words: ArrayLike | None = None,
    ) -> None:
        if not rows:
            raise DataError("there are no rows to score: give at least one", field="rows")
        self.scorer = scorer
        self.template = template
        self.labels = tuple(labels)
        self.spec = objective
        if (objective.loss == "nll") == bool(self.labels):
            raise InputError(
                f"loss {objective.loss!r} does not fit a task with {len(self.labels)} labels: use nll without labels, "
                "cross_entropy or hinge with labels",
                field="loss",
            )
        self.label_word_ids = label_word_ids(scorer, template, self.labels)
        if words is None and self.labels:
            known = np.concatenate(self.label_word_ids)
            words = word_ids(scorer.n_vocab, objective.readout_words, prompt.seed, known)
        self.word_ids = np.array([] if words is None else words, dtype=np.int32)
        self.answering: AnswerObjective | None = None
        """Measures the model's own answers, by which `losses` then rates candidates; set by `answered_by`."""
        self.readout: Readout | None = None
        """Correction of the label words' logits of every candidate; None: the model's own. Set by `read_by`."""
        self.targets = targets_of(rows, self.labels)
        """Label indices [n]; zeros without labels."""
        self._cue = np.asarray(cue_ids(scorer, template), dtype=np.int32)
        n_bos = len(bos_ids(scorer))
        texts = [render_ids(scorer, template, text, objective.max_text_tokens) for text, _ in rows]
        # In front placement the prompt goes between BOS and the text; in cue placement each text has its own BOS.
        self._prefix = texts[0][:n_bos] if prompt.placement == "front" and n_bos else None
        self._tokens = [text[n_bos:] if self._prefix is not None else text for text in texts]
        self._prompt = prompt
        limit = objective.max_text_tokens
        self._answers = (
            [self.label_word_ids] * len(rows)
            if self.labels
            else [[target_ids(scorer, template, str(target), limit)] for _, target in rows]
        )
        longest = max(map(len, texts))
        room = scorer.n_ctx_train - (prompt.n_prompt if prompt.in_front else 0)
        if longest > room:
            raise InputError(
                f"a text of {longest} tokens (template included) with n_prompt {prompt.n_prompt} exceeds the model's "
                f"context of {scorer.n_ctx_train}: use a smaller n_prompt or max_text_tokens",
                field="max_text_tokens",
                limit=scorer.n_ctx_train,
            )
        self._plan = self._compile(np.arange(len(rows)), self._tokens, keep_kv)
        self._start = start_rows(scorer, self._cue, prompt)
        self.evaluations = 0
        """Candidates scored so far."""
        self.tokens = 0
        """Forward tokens computed so far; a text whose KV is kept counts once."""

    def __len__(self) -> int:
        return len(self._tokens)

    def read_by(self, readout: Readout | None) -> Objective:
        """Copy with another ``readout``, sharing rows and their KV. Its counters continue independently."""
        made = copy.copy(self)
        made.readout = readout
        return made

    def answered_by(self, answering: AnswerObjective) -> Objective:
        """Copy that rates candidates by the model's own answers, sharing rows and KV. Its counters are its own."""
        made = copy.copy(self)
        made.answering = answering
        return made

    @property
    def prompt(self) -> PromptSpec:
        return self._prompt

    @cached_property
    def projection(self) -> Projection:
        """Raises `InputError` for shifts whose size is unknown."""
        if self._prompt.shifts and self._prompt.shift is UNSET:
            raise InputError("the prompt has no shift: use the spec of a run that has measured it", field="shift")
        return Projection(self._prompt, self._start, self.scorer.embedding_std)

    def embeds(self, latents: ArrayLike) -> NDArray[np.float32]:
        """Soft prompts [k, n_prompt, n_embd] of latents [k, d]; but in front, z = 0 is exactly the zero-shot model."""
        return self.projection.embeds(latents)

    def zero_shot_embeds(self) -> NDArray[np.float32]:
        """The candidate [1, n_prompt, n_embd] that leaves the model unchanged: the cue's rows; elsewhere no rows."""
        rows = self._start
        return rows[None] if self.prompt.placement == "cue" else rows[None, :0]

    def prompts(self, latents: NDArray[np.float64]) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        """Yield (indices into ``latents`` [k, d], their prompts), with z = 0 as the model without a prompt.

        Prompts are grouped by number of rows: in front, z = 0 has none. Raises `InputError` for another d.
        """
        if latents.shape[1:] != (self.prompt.d,):
            raise InputError(
                f"latents must have shape [k, {self.prompt.d}], got {list(latents.shape)}", field="latents"
            )
        bare = ~latents.any(axis=1) if self.prompt.placement != "cue" else np.zeros(len(latents), dtype=bool)
        if bare.any():
            yield np.flatnonzero(bare), np.repeat(self.zero_shot_embeds(), bare.sum(), axis=0)
        if not bare.all():
            yield np.flatnonzero(~bare), self.embeds(latents[~bare])

    def losses(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        rng: np.random.Generator | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        row_weights: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Mean loss [k] of each candidate over the chosen rows; the perturbed ratio if ``spec.perturb`` > 0.

        With `answering`, a row's loss is 1 − the metric of the model's own answer, plus at most `TIE` by the likelihood
        of its target text: most candidates' answers are worth the same.

        Args:
            embeds: [k, n_prompt, n_embd].
            indices: rows to use; None: all.
            rng: draws the replacement tokens of the perturbed copy; required if ``spec.perturb`` > 0.
            progress: called with (rows done, total rows) after each scoring call.
            cancelled: called before each scoring call.
            row_weights: weights [n] of all rows' losses; None: 1 each.

        Raises:
            ScoringInterrupted: ``cancelled`` returned True.
        """
        chosen = self._indices(indices)
        if self.answering is not None:
            return self._answer_losses(self.answering, embeds, chosen, progress, cancelled, row_weights)
        rate = self.spec.perturb
        passes = 2 if rate > 0 else 1
        sums = []
        for step in range(passes):
            report = _shifted(progress, step * len(chosen), passes * len(chosen))
            replaced = self._perturbed(chosen, rate, rng) if step == 1 else None
            total = np.zeros(len(np.asarray(embeds)))
            for part, raw in self._raw(embeds, chosen, replaced, report, cancelled):
                total += self._losses(part, self._read_out_alike(raw), row_weights).sum(axis=1)
            sums.append(total)
        self.evaluations += len(total)
        return sums[0] / len(chosen) if passes == 1 else perturbed_ratio(*sums)

    def _answer_losses(
        self,
        answering: AnswerObjective,
        embeds: ArrayLike,
        chosen: NDArray[np.intp],
        progress: Progress | None,
        cancelled: Cancelled | None,
        row_weights: NDArray[np.float64] | None,
    ) -> NDArray[np.float64]:
        nll = self.row_losses(embeds, chosen, cancelled)
        before = answering.n_tokens
        found = answering.measure(embeds, chosen, progress or _silent, cancelled or _never)
        self.tokens += answering.n_tokens - before
        self.evaluations += len(nll)
        losses = answer_loss(found.rewards, nll)
        weighted = losses if row_weights is None else losses * row_weights[chosen]
        return np.asarray(weighted.mean(axis=1))

    def row_losses(
        self, embeds: ArrayLike, indices: ArrayLike, cancelled: Cancelled | None = None
    ) -> NDArray[np.float64]:
        """Unperturbed loss [k, n] of each candidate on each row; otherwise as `losses`. `evaluations` is unchanged."""
        return self.row_results(embeds, indices, cancelled)[0]

    def row_results(
        self, embeds: ArrayLike, indices: ArrayLike, cancelled: Cancelled | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """`row_losses`, and whether each candidate's prediction is correct [k, n]; False for target texts."""
        losses = []
        correct = []
        for part, raw in self._raw(embeds, self._indices(indices), None, None, cancelled):
            read_out = self._read_out_alike(raw)
            losses.append(self._losses(part, read_out))
            correct.append((read_out.argmax(axis=-1) == self.targets[part]) & bool(self.labels))
        return np.concatenate(losses, axis=1), np.concatenate(correct, axis=1)

    def evaluate(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        progress: Progress | None = None,
        cancelled: Cancelled | None = None,
        readouts: Sequence[Readout | None] = (),
        others: Sequence[NDArray[np.float32]] = (),
        row_weights: NDArray[np.float64] | None = None,
    ) -> Evaluation:
        """Evaluate each candidate's predictions and loss, with ``readouts``, one per candidate, if given.

        ``others``: `logits` of the same rows under each of the readouts' other templates.
        Other arguments and errors as for `losses`; never perturbed.
        """
        chosen = self._indices(indices)
        candidates = np.asarray(embeds, dtype=np.float32)
        k = len(candidates)
        # Candidates that differ only in their readout are scored once.
        _, first, which = np.unique(candidates.reshape(k, -1), axis=0, return_index=True, return_inverse=True)
        which = which.ravel()  # numpy 2.0 gives it a second axis
        if readouts and len(readouts) != k:
            raise InputError(f"{len(readouts)} readouts for {k} candidates: give one each, or none", field="readouts")
        weights = [self._blocks(readout) for readout in readouts or [self.readout] * k]
        wrong = {len(own) - 1 for own in weights} - {0, len(others)}
        if wrong:
            raise InputError(
                f"a readout has {wrong.pop()} other templates, got logits of {len(others)}: pass those of each",
                field="others",
            )
        predictions = []
        losses = []
        done = 0
        for part, raw in self._raw(candidates[first], chosen, None, progress, cancelled):
            read_out = self._read_out(raw[which], weights, [own[done : done + len(part)] for own in others])
            losses.append(self._losses(part, read_out, row_weights))
            predictions.append(read_out.argmax(axis=-1) if self.labels else np.full(read_out.shape[:2], -1))
            done += len(part)
        self.evaluations += k
        of_rows = np.concatenate(losses, axis=1)
        labels = np.concatenate(predictions, axis=1)
        correct = (labels == self.targets[chosen]).sum(axis=1)
        return Evaluation(
            n=len(chosen),
            correct=tuple(int(count) for count in correct),
            loss_sums=tuple(float(total) for total in sum(each.sum(axis=1) for each in losses)),
            losses=of_rows,
            predictions=labels,
        )

    def logits(self, embeds: ArrayLike, indices: ArrayLike, cancelled: Cancelled | None = None) -> NDArray[np.float32]:
        """Logits [n, n_labels + n_words] of one candidate [1, n_prompt, n_embd], to fit a readout to."""
        parts = self._raw(embeds, self._indices(indices), None, None, cancelled)
        return np.concatenate([raw[0] for _, raw in parts])

    def as_prompt(
        self,
        latent: ArrayLike,
        task: Task,
        history: tuple[Mapping[str, Any], ...] = (),
        others: tuple[Template, ...] = (),
        layer_readout: LayerReadout | None = None,
    ) -> Prompt:
        """Make the `Prompt` of one latent [d], with this objective's ``readout``; ``others``: its other templates.

        z = 0 gives the rows of no prompt, in front too: P0. ``layer_readout``: used instead of ``readout``.
        """
        n_words = 0 if self.readout is None else self.readout.weights.shape[0] - 1
        weights = self._blocks(self.readout)[:, : 1 + n_words]  # drop words that the readout does not use
        return Prompt(
            rows=self.embeds(np.asarray(latent, dtype=np.float64)[None])[0],
            spec=self.prompt,
            task_name=task.name,
            labels=self.labels,
            template=self.template,
            model_fingerprint=self.scorer.fingerprint,
            model_name=self.scorer.name,
            architecture=self.scorer.architecture,
            history=history,
            label_bias=weights[0, 0],
            word_ids=self.word_ids[:n_words],
            word_weights=weights[0, 1:],
            others=others,
            other_weights=weights[1:],
            layer_readout=layer_readout,
            task=task,
        )

    def _indices(self, indices: ArrayLike | None) -> NDArray[np.intp]:
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.intp)
        if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= len(self):
            raise InputError(f"indices must be a non-empty list from 0 to {len(self) - 1}", field="indices")
        return chosen

    def _perturbed(
        self, chosen: NDArray[np.intp], rate: float, rng: np.random.Generator | None
    ) -> list[NDArray[np.int32]]:
        if rng is None:
            raise InputError("the perturbed objective needs a random generator: pass rng", field="rng")
        keep = len(self._cue)
        return [perturb(self._tokens[i], keep, rate, self.scorer.n_vocab, rng) for i in chosen]

    def _losses(
        self, part: NDArray[np.intp], read_out: NDArray[np.float64], row_weights: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Weighted losses [k, n] of the results of `_read_out`."""
        if self.spec.loss == "nll":
            losses: NDArray[np.float64] = -read_out[..., 0] / [len(self._answers[i][0]) for i in part]
        else:
            losses = LOSSES[self.spec.loss](read_out, self.targets[part])
        return losses if row_weights is None else losses * row_weights[part]

    def _read_out_alike(self, raw: NDArray[np.float32]) -> NDArray[np.float64]:
        """`_read_out` with this objective's ``readout`` for all candidates."""
        return self._read_out(raw, [self._blocks(self.readout)] * len(raw), ())

    def _read_out(
        self, raw: NDArray[np.float32], weights: Sequence[NDArray[np.float64]], others: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float64]:
        """Label logits [k, n, n_labels] corrected by each candidate's ``weights``; without labels, ``raw``."""
        if not self.labels:
            return raw.astype(np.float64)
        return np.stack([ensemble([own, *others][: len(v)], v) for own, v in zip(raw, weights, strict=True)])

    def _raw(
        self,
        embeds: ArrayLike,
        chosen: NDArray[np.intp],
        replaced: list[NDArray[np.int32]] | None,
        progress: Progress | None,
        cancelled: Cancelled | None,
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        """Yield chunks of rows with their scores [k, n, n_labels + n_words].

        Scores are the label words' logits (log-probabilities if one has several tokens), or the target text's
        log-probability; then the random words' logits.
        """
        candidates = np.asarray(embeds, dtype=np.float32)
        if candidates.ndim != 3:
            raise InputError(
                f"embeds must have shape [k, n_prompt, n_embd], got {list(candidates.shape)}", field="embeds"
            )
        for start in range(0, len(chosen), CHUNK):
            if cancelled is not None and cancelled():
                raise ScoringInterrupted(f"scoring was cancelled after {start} of {len(chosen)} texts")
            part = chosen[start : start + CHUNK]
            if replaced is None:
                plan = self._plan
                which = part
            else:
                texts = replaced[start : start + CHUNK]
                plan = self._compile(part, texts, keep_kv=False)
                which = np.arange(len(texts))
            before = plan.n_tokens
            raw = plan.score(candidates, which)
            self.tokens += plan.n_tokens - before
            yield part, raw
            if progress is not None:
                progress(start + len(part), len(chosen))

    def _compile(self, rows: NDArray[np.intp], texts: list[NDArray[np.int32]], keep_kv: bool) -> Plan:
        """Compile ``texts``, the tokens of ``rows`` as they are or perturbed."""
        answers: list[list[NDArray[np.int32]]] | None = [self._answers[i] for i in rows]
        ids = self.word_ids
        if self.labels and all(len(word) == 1 for word in self.label_word_ids):
            # Logits suffice for label words of one token.
            answers = None
            ids = np.concatenate([*self.label_word_ids, self.word_ids])
        return self.scorer.compile(
            texts, ids, continuations=answers, keep_kv=keep_kv, prefix=self._prefix, **placing(self._prompt)
        )

    def _blocks(self, readout: Readout | None) -> NDArray[np.float64]:
        return blocks(readout, len(self.word_ids), len(self.labels))

    def __repr__(self) -> str:
        place = f"{self.prompt.n_prompt} x {self.prompt.placement}"
        return f"Objective({len(self)} rows, {len(self.labels)} labels, {self.spec.loss}, {place})"


def _silent(_done: int, _total: int) -> None:
    pass


def _never() -> bool:
    return False


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    report = progress
    return lambda done, _: report(before + done, total)
