"""Generated texts of every architecture against transformers, from a new generator."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_case import Case

from fedbpt.engine.native_generator import NativeGenerator
from fedbpt.engine.text_generator import Placed, Sampling

N_TOKENS = 6


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_each_token_is_the_likeliest_and_has_its_log_probability(case: Case, placement: str) -> None:
    ids, rows = case.ids(70), case.prompts(1, 3)[0]
    given = Placed(ids, rows, 1 if placement == "front" else len(ids) - len(rows))
    stream = NativeGenerator(case.scorer._engine, case.scorer._files).open(given, Sampling())
    tokens = [stream.next(n_likeliest=3) for _ in range(N_TOKENS)]

    read = np.concatenate([ids, [token.id for token in tokens[:-1]]])
    inputs = case.reference.token_embeddings(read)
    inputs[given.rows_at : given.rows_at + len(rows)] = rows
    logits = case.reference.logits(inputs)[len(ids) - 1 :]
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    tolerance = 2 * case.model.tolerance * case.reference.logits(case.ids(64)).std()
    for token, expected in zip(tokens, log_p, strict=True):
        assert abs(token.log_prob - expected[token.id]) <= tolerance
        assert expected[token.id] >= expected.max() - tolerance
        assert [p for _, p in token.likeliest] == pytest.approx(np.sort(expected)[:-4:-1], abs=tolerance)
