"""Generated tokens per second: many texts at a time under many candidates, against one at a time and other engines.

16 candidates, each with shifts of all layers, continue 8 AG-News-like texts of some 56 tokens by 32 tokens, greedily.

fedbpt                 `plan.generate`: 128 texts at a time, on shared KV of the texts
fedbpt, one at a time  the generator for chats, text after text, KV of a text's beginning reused
llama-cpp-python       one text after the other, without prompts
transformers           a padded batch of all 128, without prompts; float32

Without prompts a peer computes less. Rates are of generated tokens; medians of alternated repeats.

    python benchmarks/bench_generation.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import UnavailableError
from peers.pytorch import load_gguf
from workload import alternate, texts_like_news

import fedbpt
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.errors import ModelNotFoundError

CANDIDATES, TEXTS, NEW_TOKENS = 16, 8, 32
ONE_BY_ONE = 8  # texts that the slow ways continue

Run = tuple[Callable[[], object], Callable[[], int]]
"""Something to time, and the number of tokens that it generated."""


def many_at_a_time(scorer: fedbpt.NativeScorer, texts: list[NDArray[np.int32]], rows: NDArray[np.float32]) -> Run:
    plan = scorer.compile(texts, None, "layers")
    answers: list[Any] = []

    def run() -> None:
        answers[:] = plan.generate(rows, max_tokens=NEW_TOKENS)

    return run, lambda: sum(len(answer.ids) for of_candidate in answers for answer in of_candidate)


def one_at_a_time(scorer: fedbpt.NativeScorer, texts: list[NDArray[np.int32]], rows: NDArray[np.float32]) -> Run:
    counts: list[int] = []

    def run() -> None:
        counts.clear()
        for number in range(ONE_BY_ONE):
            text = texts[number % len(texts)]
            placed = Placed(text, rows[number % len(rows)], len(text) - 1, (0, scorer.n_layer, True))
            stream = scorer.generator.open(placed, Sampling())
            n = 0
            while n < NEW_TOKENS and not scorer.generator.is_end(stream.next().id):
                n += 1
            stream.close()
            counts.append(n)

    return run, lambda: sum(counts)


def stock(scorer: fedbpt.NativeScorer, texts: list[NDArray[np.int32]]) -> Run:
    try:
        import llama_cpp
    except ImportError as error:
        raise UnavailableError("llama-cpp-python is not installed: pip install '.[bench]'") from error
    model = llama_cpp.Llama(str(scorer.path), n_ctx=512, n_threads=scorer.n_threads, verbose=False)
    counts: list[int] = []

    def run() -> None:
        counts.clear()
        for text in texts[:ONE_BY_ONE]:
            n = 0
            for token in model.generate(text.tolist(), temp=0.0, repeat_penalty=1.0):
                if n == NEW_TOKENS or token == model.token_eos():
                    break
                n += 1
            counts.append(n)

    return run, lambda: sum(counts)


def transformers_batch(scorer: fedbpt.NativeScorer, texts: list[NDArray[np.int32]]) -> Run:
    model = load_gguf(scorer.path, scorer.n_threads)
    import torch

    longest = max(map(len, texts))
    padded = np.zeros((CANDIDATES * len(texts), longest), dtype=np.int64)
    mask = np.zeros_like(padded)
    for row in range(len(padded)):
        text = texts[row % len(texts)]
        padded[row, longest - len(text) :] = text
        mask[row, longest - len(text) :] = 1

    def run() -> None:
        with torch.no_grad():
            model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )

    return run, lambda: len(padded) * NEW_TOKENS


def bench(name: str, given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any] | None:
    try:
        scorer = fedbpt.load_model(name, n_threads=given.threads)
    except ModelNotFoundError as error:
        say(f"skipped {name}: {error}")
        return None
    texts = texts_like_news(scorer, TEXTS)
    drawn = np.random.default_rng(0).standard_normal((CANDIDATES, scorer.n_layer, scorer.n_embd))
    rows = (0.02 * drawn).astype(np.float32)
    runs: dict[str, Run] = {
        "fedbpt": many_at_a_time(scorer, texts, rows),
        "fedbpt, one at a time": one_at_a_time(scorer, texts, rows),
    }
    skipped = {}
    for peer, make in (("llama-cpp-python", stock), ("transformers", transformers_batch)):
        try:
            runs[peer] = make(scorer, texts)
        except UnavailableError as reason:
            skipped[peer] = str(reason)
            say(f"skipped {peer}: {reason}")
    for run, _ in runs.values():
        run()
    taken = alternate({each: run for each, (run, _) in runs.items()}, given.repeats)
    rates = {each: runs[each][1]() / taken[each] for each in runs}
    say(f"{scorer!r}: {CANDIDATES} candidates, {TEXTS} texts; generated tokens per second")
    for each, rate in rates.items():
        ratio = "" if each == "fedbpt" else f"   fedbpt is {rates['fedbpt'] / rate:.1f} times as fast"
        say(f"  {each:24} {rate:9.1f}{ratio}")
    return {"model": scorer.name, "tokens_per_second": rates, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="name or GGUF file, repeatable (default: smollm2-135m)")
    parser.add_argument("--threads", type=int, help="for fedbpt and the peers (default: physical cores)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    given = parser.parse_args()

    def say(text: str) -> None:
        if not given.json:
            print(text, flush=True)

    found = [bench(name, given, say) for name in given.model or ["smollm2-135m"]]
    print(json.dumps({"benchmark": "generation", "models": [each for each in found if each]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
