"""The workload of the benchmarks (AG-News-like texts, label words, prompts), and timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import fedbpt

LABELS = (" World", " Sports", " Business", " Technology")
CUE = " Topic:"
SENTENCES = (
    (
        "Talks between the two governments broke down on Sunday after envoys failed to agree on a new border.",
        "Rescue teams searched for survivors on Monday as floods cut off dozens of villages in the north.",
        "The president said that elections would be held in May, in spite of protests across the capital.",
        "Three soldiers were wounded when a bomb went off beside their convoy, the army said in a statement.",
    ),
    (
        "The striker scored twice in the second half as the visitors came from behind to win the cup final.",
        "She broke her own world record in the 200 metres on the last night of the championships in Athens.",
        "The Red Sox beat the Yankees 6-4 in extra innings to level the series at two games each.",
        "His coach said that the knee injury would keep the quarterback out for the rest of the season.",
    ),
    (
        "Stocks rose on Wall Street on Tuesday after the central bank said that it would keep rates where they are.",
        "Shares in Europe ended the day little changed as investors waited for figures on jobs and trade.",
        "The retailer cut its forecast for the quarter, blaming high oil prices and weak demand for clothes.",
        "Profit at the bank fell 12 percent last year, but it will still pay its shareholders a dividend.",
    ),
    (
        "The company released a patch on Thursday for a flaw that lets attackers take over Windows computers.",
        "Scientists say that the probe has sent back the clearest pictures yet of the rings of Saturn.",
        "A new chip with two cores on one die will go on sale in the spring, the maker told developers.",
        "The search engine now indexes eight billion pages and will let users look for videos as well.",
    ),
)


def texts_like_news(
    scorer: fedbpt.NativeScorer, n: int, n_tokens: int = 56, spread: float = 1 / 3
) -> list[NDArray[np.int32]]:
    """``n`` token sequences of about ``n_tokens`` tokens, ± ``spread`` of it, each ending in the answer cue."""
    rng = np.random.default_rng(0)
    cue = scorer.tokenize(CUE, add_bos=False)
    texts = []
    for length in rng.integers(round(n_tokens * (1 - spread)), round(n_tokens * (1 + spread)) + 1, n):
        topic = SENTENCES[rng.integers(len(SENTENCES))]
        ids: list[int] = []
        while len(ids) < length:
            ids.extend(scorer.tokenize(" " + topic[rng.integers(len(topic))], add_bos=False))
        texts.append(np.concatenate([np.array(ids[: length - len(cue)], dtype=np.int32), cue]))
    return texts


def label_ids(scorer: fedbpt.NativeScorer) -> NDArray[np.int32]:
    """The label words' first tokens, int32 [4]."""
    return np.array([scorer.tokenize(label, add_bos=False)[0] for label in LABELS], dtype=np.int32)


def prompts(scorer: fedbpt.NativeScorer, n_candidates: int, n_prompt: int) -> NDArray[np.float32]:
    """float32 [n_candidates, n_prompt, n_embd]: embeddings of a text, slightly perturbed for each candidate."""
    ids = scorer.tokenize(" ".join(sentence for topic in SENTENCES for sentence in topic))[:n_prompt]
    rows = scorer.token_embeddings(ids)
    noise = np.random.default_rng(1).standard_normal((n_candidates, *rows.shape), dtype=np.float32)
    return np.asarray(rows + 0.1 * scorer.embedding_std * noise, dtype=np.float32)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run over ``repeats``, alternating the runs, so that noise affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(taken) for name, taken in times.items()}


def log_slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log(time) over log(size) by least squares: 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
