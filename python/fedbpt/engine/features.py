"""Features of texts: what a model's layers hold after it has read them, for any classifier."""

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
    """Features [len(texts), len(layers) · n_embd] of texts, as scikit-learn takes them.

    Of each layer the state at the last token, over its root mean square: forward passes only, no label needed. ::

        x = fedbpt.features(scorer, texts, cue="\\nTopic:")
        LogisticRegression(max_iter=1000).fit(x, labels)

    Args:
        scorer: from `load_model`.
        texts: N texts, none empty.
        layers: ascending, from 0; None: the one at three quarters of the depth, and the last.
        cue: follows each text. One that asks for what you want to know ("\\nTopic:") gives better features than none.
        prefix: before each text, an instruction.

    Raises:
        InputError: no or an empty text, a text longer than the context, no such layer.
        UnsupportedModelError: llama.cpp does not say where this architecture's layers end.
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
