"""``python -m tests.faults.model_user``: uses the model files listed on standard input like a long-lived process.

Nothing may end it. It prints a line per file: "used", "refused TYPE REASON" (a `FedbptError`), or "wrong REASON".
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import zlib

import numpy as np

from fedbpt import _native
from fedbpt.errors import FedbptError, InputError

N_TEXTS, N_ROWS, N_LONG = 12, 2, 120


def use(path: str) -> None:
    """Use a model as `fedbpt` does: texts of many lengths, all kinds of scores, and generation."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    engine = _native.Engine(path, 1, 0, "", False)
    _native.weight_formats(path)
    _native.tensor_shapes(path)
    assert np.isfinite(engine.embedding_std()), "the spread of the embeddings"
    engine.memory()
    assert engine.description
    _read(engine, rng)
    _score(engine, rng)
    _generate(engine, rng)


def _read(engine: _native.Engine, rng: np.random.Generator) -> None:
    points = rng.integers(1, 0x110000, 3000)
    unusual = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    for text in (unusual, "a" * 20_000, " 0\n" * 500, "the market of science"):
        ids = engine.tokenize(text, False)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < engine.n_vocab), "a token outside the vocabulary"


def _score(engine: _native.Engine, rng: np.random.Generator) -> None:
    most = min(engine.n_ctx_train, N_LONG) - 2 - N_ROWS
    lengths = [N_ROWS, most, *rng.integers(N_ROWS, max(N_ROWS + 1, most // 4), N_TEXTS)]
    texts = _ragged([rng.integers(0, engine.n_vocab, length) for length in lengths if length >= N_ROWS])
    n = len(texts[1]) - 1
    labels = rng.integers(0, engine.n_vocab, 3).astype(np.int32)
    prefix = rng.integers(0, engine.n_vocab, 1).astype(np.int32)
    ids = rng.integers(0, engine.n_vocab, 2 * N_ROWS).astype(np.int32)
    rows = engine.token_embeddings(ids).reshape(2, N_ROWS, -1)
    follow = _ragged([rng.integers(0, engine.n_vocab, length) for _ in range(n) for length in (1, 2)])
    nothing = _ragged([])
    for cue, wanted, continuations in ((False, labels, nothing), (True, labels, nothing), (False, None, follow)):
        plan = engine.plan(texts, wanted, cue, prefix, continuations, [0], 1 << 20)
        which = np.arange(n) if wanted is not None else np.arange(2)
        for _ in range(2):
            assert np.isfinite(engine.score(plan, which, rows)).all(), "scores that are not finite"
        assert np.isfinite(engine.score_states(plan, which, rows)[1]).all(), "states that are not finite"
    for shifted in ((0, 1, False), (0, engine.n_layer, True)):
        plan = engine.plan(texts, labels, False, prefix, nothing, [], 1 << 20, shifted)
        shifts = np.repeat(rows[:, :1], shifted[1], axis=1)
        assert np.isfinite(engine.score(plan, np.arange(n), shifts)).all(), "shifted scores that are not finite"


def _generate(engine: _native.Engine, rng: np.random.Generator) -> None:
    generator = engine.generator()
    for length in (1, min(engine.n_ctx_train, N_LONG) - 4, 4):
        ids = rng.integers(0, engine.n_vocab, max(1, length)).astype(np.int32)
        rows = engine.token_embeddings(ids[: length // 2])
        shifted = (0, len(rows), True) if 0 < len(rows) <= engine.n_layer else None
        stream = generator.open(ids, rows, 0, 0.7, 0.9, 0, 1, shifted)
        for _ in range(3):
            token, log_prob, _ = generator.next(stream, 2)
            generator.piece(token)
            assert np.isfinite(log_prob), "a probability that is not finite"
    with contextlib.suppress(InputError):  # most models have no chat template
        generator.chat_ids([("system", "the answer"), ("user", "of the team")])


def _ragged(texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return (np.concatenate(texts) if texts else np.empty(0)).astype(np.int32), offsets


def outcome(path: str) -> str:
    """Use a file; returns the outcome as a line."""
    try:
        use(path)
    except FedbptError as error:
        message = str(error)
        if message.splitlines() != [message] or path.rpartition("/")[2] not in message:
            return f"wrong {type(error).__name__}: {message!r}"
        return f"refused {type(error).__name__} {message}"
    except BaseException as error:  # noqa: BLE001 - only a FedbptError may be raised
        return "wrong " + traceback.format_exc().replace("\n", " | ") + repr(error)
    return "used"


if __name__ == "__main__":
    for line in sys.stdin:
        print(outcome(line.strip()), flush=True)
