"""`LayerRows`: a device's training rows as the fit of a `LayerReadout` reads them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.device.effort import Effort
from fedbpt.engine.discriminant import assign_folds
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import InputError
from fedbpt.objective.layer_view import LayerView, Views, read_views
from fedbpt.objective.objective import Cancelled, Objective, Progress
from fedbpt.protocol.rounds import HeldRows, PublicWork, Reading, RoundPlan
from fedbpt.protocol.seeding import generator
from fedbpt.tasks.public_texts import public_texts
from fedbpt.tasks.rows import Row, batch_indices, targets_of

_MAX_VIEWS = 12  # cached: states of all rows under one template, float16
_NO_ROWS = np.zeros(0, dtype=np.intp)


def fitted_rows(
    targets: NDArray[np.intp], max_rows: int, n_folds: int, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The rows of a fit, ascending, and their folds; the same in all exchanges. ``targets``: label indices [n]."""
    rows = batch_indices(len(targets), max_rows, generator(seed, "layers"), targets)
    return rows, assign_folds(targets[rows], n_folds, generator(seed, "folds"))


def spread_folds(folds: NDArray[np.intp], n_folds: int, seed: int, device: str) -> NDArray[np.intp]:
    """``folds`` with all but fold 0 renumbered at random: else devices of a row or two would fill the same folds."""
    numbers = np.append(0, 1 + generator(seed, "folds", device).permutation(n_folds - 1))
    found: NDArray[np.intp] = numbers[folds]
    return found


def held_rows(targets: NDArray[np.intp], held: HeldRows | None) -> NDArray[np.intp]:
    """The rows that the search does not see, ascending; empty where it would see none."""
    if held is None:
        return _NO_ROWS
    rows, folds = fitted_rows(targets, held.max_rows, held.n_folds, held.seed)
    found: NDArray[np.intp] = rows[folds == 0]
    return found if len(found) < len(targets) else _NO_ROWS


def any_rows(n_rows: int, max_rows: int, seed: int) -> NDArray[np.intp]:
    """At most ``max_rows`` of the rows (0: all), ascending, whatever their labels are."""
    return batch_indices(n_rows, max_rows, generator(seed, "layers"))


class LayerRows:
    """Reads rows, and keeps their states: the exchanges of a fit use the same ones.

    Args:
        scorer: the model.
        rows: all training rows.
        labels: of the task.
    """

    def __init__(self, scorer: Scorer, rows: Sequence[Row], labels: tuple[str, ...]) -> None:
        self._scorer = scorer
        self._rows = rows
        self._labels = labels
        self._kept: OrderedDict[bytes, Views] = OrderedDict()
        self._public: tuple[bytes, Views] | None = None

    @cached_property
    def targets(self) -> NDArray[np.intp]:
        """Label indices [n] of all training rows. Raises `DataError` for a row that does not fit the task."""
        return targets_of(self._rows, self._labels)

    def read_public(
        self, plan: RoundPlan, work: PublicWork, effort: Effort, progress: Progress, cancelled: Cancelled
    ) -> Views:
        """The views of the public texts of ``work``."""
        reading = work.reading
        self._check_layers(reading)
        key = msgspec.msgpack.encode((work, plan.template, plan.labels, plan.objective.max_text_tokens, plan.seed))
        if self._public is not None and self._public[0] == key:
            return self._public[1]
        limit = plan.objective.max_text_tokens
        views = [
            LayerView(self._scorer, template, plan.labels if i < reading.n_word_views else (), limit, reading.layers)
            for i, template in enumerate((plan.template, *reading.templates))
        ]
        found = read_views(views, public_texts(work.n_texts, plan.seed), progress, cancelled)
        effort.evaluations += len(views)
        effort.tokens += sum(view.tokens for view in views)
        self._public = key, found
        return found

    def _check_layers(self, reading: Reading) -> None:
        if not all(0 <= layer < self._scorer.n_layer for layer in reading.layers) or not reading.layers:
            raise InputError(
                f"layers must be within 0 and {self._scorer.n_layer - 1}, got {list(reading.layers)}", field="layers"
            )

    def read(
        self,
        plan: RoundPlan,
        reading: Reading,
        rows: NDArray[np.intp],
        objective: Callable[[], Objective],
        effort: Effort,
        progress: Progress,
        cancelled: Cancelled,
    ) -> Views:
        """The views of ``rows`` that ``reading`` asks for.

        ``objective``: makes the one of the plan's template, for its prompt; called where the reading has one.
        """
        self._check_layers(reading)
        latent = reading.latent.numpy()
        prompt = msgspec.msgpack.encode((latent.tolist(), plan.prompt)) if latent.any() else b""
        asked = [(plan.template, prompt), *((template, b"") for template in reading.templates)]
        keys = []
        missing: dict[bytes, LayerView] = {}
        for place, (template, of_prompt) in enumerate(asked):
            labels = plan.labels if place < reading.n_word_views else ()
            limit = plan.objective.max_text_tokens
            what = (template, of_prompt, labels, limit, reading.layers, rows.tobytes())
            key = msgspec.msgpack.encode(what)
            keys.append(key)
            if key in self._kept:
                self._kept.move_to_end(key)
                continue
            embeds = objective().embeds(latent[None])[0] if of_prompt else None
            missing[key] = LayerView(self._scorer, template, labels, limit, reading.layers, embeds, plan.prompt)
        if missing:
            views = list(missing.values())
            found = read_views(views, [self._rows[row][0] for row in rows], progress, cancelled)
            effort.evaluations += len(views)
            effort.tokens += sum(view.tokens for view in views)
            words = iter(np.moveaxis(found.words, 1, 0))
            for place, (key, view) in enumerate(missing.items()):
                scored = next(words)[:, None] if view.scores_words else np.zeros((len(rows), 0, 0))
                self._kept[key] = Views(found.states[:, place : place + 1], scored)
        views_found = [self._kept[key] for key in keys]
        while len(self._kept) > _MAX_VIEWS:
            self._kept.popitem(last=False)
        of_words = [each.words for each in views_found if each.words.size]
        return Views(
            np.concatenate([each.states for each in views_found], axis=1),
            np.concatenate(of_words, axis=1) if of_words else np.zeros((len(rows), 0, 0)),
        )
