"""Whether a run reads its labels from hidden states, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedbpt.aggregation.layer_fit import max_readers
from fedbpt.protocol.rounds import N_FOLDS
from fedbpt.protocol.specs import Template
from fedbpt.runs.settings import RunSettings
from fedbpt.secure.sizes import most_readers

MAX_WORD_BYTES: Final = 120
"""Label words of more bytes together, in UTF-8, are not scored: each text would cost dozens of tokens more."""

LOOKS: Final = (0.25, 0.5)
"""Shares of the budget after which interim looks may end a search that gains nothing (`RunSettings.stop_if_futile`)."""

LAST_LOOK: Final = 0.75
"""Share of the budget after which a look would save too little."""

LOOK_ROUNDS: Final = 10
"""Rounds of the search before the first of them."""


def within_message(
    layers: tuple[int, ...], n_views: int, n_labels: int, n_embd: int, secure: bool = False
) -> tuple[tuple[int, ...], int]:
    """The last of ``layers``, and the number of the first views, whose classifiers fit into a message.

    All of them, but for large models with many labels. ``n_embd`` 0: unknown. ``secure``: sketches must fit, too.
    """
    most = max_readers(n_labels, n_embd)
    if secure:
        most = min(most, most_readers(N_FOLDS, n_labels, n_embd))
    kept = layers[-max(min(len(layers), most // min(n_views, 2)), 1) :]
    return kept, max(min(n_views, most // len(kept)), 1)


def reads_layers(templates: Sequence[Template], settings: RunSettings, n_layer: int) -> bool:
    """Whether readouts are fitted to hidden states; else to the logits of random words.

    ``templates``: the task's; ``n_layer``: layers of the model that can be read, 0: none.
    """
    return bool(templates[0].label_words) and settings.may_read_layers and n_layer > 0


def states_alone(templates: Sequence[Template], settings: RunSettings, n_layer: int) -> bool:
    """Whether the label words are too long to be scored: only hidden states are read, and no prompt is tuned."""
    lengths = [sum(len(word.encode()) for word in template.label_words) for template in templates]
    return reads_layers(templates, settings, n_layer) and min(lengths) > MAX_WORD_BYTES


def only_reads(templates: Sequence[Template], settings: RunSettings, n_layer: int) -> bool:
    """Whether a run only makes a readout: no template is selected, no prompt tuned."""
    alone = states_alone(templates, settings, n_layer)
    return alone or (settings.reads_privately and reads_layers(templates, settings, n_layer))


def has_looks(templates: Sequence[Template], settings: RunSettings, n_layer: int) -> bool:
    """Whether a run has interim looks: held-out rows judge it, and there is a probe to compare with."""
    trusted = settings.stop_if_futile and settings.robust == "none"
    return trusted and reads_layers(templates, settings, n_layer) and not only_reads(templates, settings, n_layer)


def most_looks(templates: Sequence[Template], settings: RunSettings, n_layer: int, rounds: int) -> int:
    """Most interim looks in ``rounds`` of the search."""
    return len(LOOKS) if rounds > LOOK_ROUNDS and has_looks(templates, settings, n_layer) else 0
