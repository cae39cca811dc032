"""Features of texts for any classifier: a model's hidden states at the last token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import checked
from fedbpt.engine.layers import check_layers, default_layers, normalized
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import InputError

CHUNK = 64
"""Texts scored at a time."""


@checked
def features(
    scorer: Scorer,
    texts: Sequence[str],
    layers: Sequence[int] | None = None,
    cue: str = "",
    prefix: str | None = None,
) -> NDArray[np.float64]:
    """Compute features [len(texts), len(layers) · n_embd] of texts, ready for scikit-learn.

    For each layer: the hidden state at the last token, divided by its root mean square. Needs forward passes only and
    no labels. ::

        x = fedbpt.features(scorer, texts, cue="\\nTopic:")
        LogisticRegression(max_iter=1000).fit(x, labels)

    Args:
        scorer: from `load_model`.
        texts: non-empty texts.
        layers: ascending, from 0; None: the one at three quarters of the depth, and the last.
        cue: appended to each text. One that asks for the property of interest ("\\nTopic:") gives better features.
        prefix: prepended to each text, for example an instruction.

    Raises:
        InputError: no texts, an empty text, a text longer than the context, no such layer.
        UnsupportedModelError: llama.cpp's graph does not mark the layer outputs of this architecture.
    """
    if not texts:
        raise InputError("there are no texts: pass at least one", field="texts")
    chosen = default_layers(scorer.n_layer) if layers is None else check_layers(layers, scorer.n_layer)
    if not chosen:
        raise InputError("there are no layers: name at least one, or pass None", field="layers")
    before = None if prefix is None else scorer.tokenize(prefix)
    after = scorer.tokenize(cue, add_bos=False)
    no_prompt = np.zeros((1, 0, scorer.n_embd), np.float32)
    no_labels: ArrayLike = []
    found = []
    for start in range(0, len(texts), CHUNK):
        part = [scorer.tokenize(text, None if prefix is None else False) for text in texts[start : start + CHUNK]]
        for i, ids in enumerate(part, start):
            if not texts[i]:
                raise InputError(f"text {i} is empty: it needs at least one token", field="texts")
            length = len(ids) + len(after) + (0 if before is None else len(before))
            if length > scorer.n_ctx_train:
                raise InputError(
                    f"text {i} with prefix and cue has {length} tokens: expected at most {scorer.n_ctx_train}",
                    field="texts",
                    limit=scorer.n_ctx_train,
                )
        plan = scorer.compile(part, no_labels, prefix=before, cue=after, layers=chosen, keep_kv=False)
        found.append(normalized(plan.score_states(no_prompt)[1][0]))
    return np.concatenate(found).reshape(len(texts), -1)
