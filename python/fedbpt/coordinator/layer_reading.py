"""Whether a run reads its labels from hidden states, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fedbpt.aggregation.layer_fit import max_readers
from fedbpt.protocol.specs import Template
from fedbpt.runs.settings import RunSettings

MAX_WORD_BYTES: Final = 120
"""Label words of more bytes together, in UTF-8, are not scored: each text would cost dozens of tokens more."""


def within_message(layers: tuple[int, ...], n_views: int, n_labels: int, n_embd: int) -> tuple[tuple[int, ...], int]:
    """The last of ``layers``, and the number of the first views, whose classifiers fit into a message.

    All of them, but for large models with many labels. ``n_embd`` 0: unknown.
    """
    most = max_readers(n_labels, n_embd)
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
