"""Time to the first generated token under a soft prompt, and tokens per second after it.

Requests with different AG-News-like texts, one at a time: 50 soft rows, the text, then greedy tokens. Peers:

recomputed         the same engine, computing the prompt's KV again for each request
llama-cpp-python   its `create_completion`, without soft prompts: the rows are 50 tokens of text. It keeps the KV of the
                   last request and reuses the common prefix, as fedbpt does.

Then as many requests as there are places, each with its own text: their tokens in one pass, against one text after the
other.

Alternated; medians are printed, and one JSON line last.

    python benchmarks/bench_serving.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import UnavailableError
from peers.stock_llama import StockModel
from workload import SENTENCES, prompts, texts_like_news

import fedbpt
from fedbpt.engine.native_generator import NativeGenerator
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.errors import ModelNotFoundError

ROWS = 50

Run = Callable[[NDArray[np.int32], int], Iterable[object]]


def timed(pieces: Iterable[object]) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it."""
    began = time.perf_counter()
    times = [time.perf_counter() for _ in pieces]
    if len(times) < 2:
        raise UnavailableError("the text ended before its second token: try another model")
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0])


def ours(generator: NativeGenerator, rows: NDArray[np.float32], text: NDArray[np.int32], n: int) -> Iterable[object]:
    ids = np.concatenate([np.zeros(len(rows), dtype=np.int32), text])
    stream = generator.open(Placed(ids, rows), Sampling())
    return (stream.next() for _ in range(n))


def at_once(generator: NativeGenerator, texts: list[Placed], n: int) -> float:
    """Tokens per second of all texts, a token of each in one pass, after their first tokens."""
    streams = [generator.open(text, Sampling()) for text in texts]
    counts = [0] * len(streams)
    generator.next_all(streams, counts)
    began = time.perf_counter()
    for _ in range(n):
        generator.next_all(streams, counts)
    return n * len(texts) / (time.perf_counter() - began)


def together(
    generator: NativeGenerator, rows: NDArray[np.float32], texts: list[NDArray[np.int32]], n: int
) -> list[float]:
    """Tokens per second of all texts at once, and of one after the other."""
    given = [Placed(np.concatenate([np.zeros(len(rows), dtype=np.int32), text]), rows) for text in texts]
    alone = [n / at_once(generator, [each], n) for each in given]
    return [at_once(generator, given, n), len(given) * n / sum(alone)]


def stock(scorer: fedbpt.NativeScorer) -> tuple[Run, str]:
    """A measuring function for llama-cpp-python, and its version. Raises `UnavailableError`."""
    version = StockModel(scorer.path, scorer.n_threads).version  # raises if it is unavailable
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    threads = scorer.n_threads
    model = llama_cpp.Llama(str(scorer.path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    words = " ".join(sentence for topic in SENTENCES for sentence in topic)
    head = scorer.tokenize(words)[:ROWS].tolist()

    def run(text: NDArray[np.int32], n: int) -> Iterable[object]:
        given = [*head, *text.tolist()]
        # -100 for tokens that would end the text: fedbpt continues, too
        bias = {model.token_eos(): -100.0}
        return model.create_completion(given, max_tokens=n, temperature=0.0, stream=True, logit_bias=bias)

    return run, version


def bench(name: str, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The results of one model; None if it has not been downloaded."""
    try:
        scorer = fedbpt.load_model(name, n_threads=args.threads)
    except ModelNotFoundError as error:
        say(f"skipped {name}: {error}")
        return None
    rows, fresh = prompts(scorer, 1, ROWS)[0], NativeGenerator(scorer._engine, scorer._files)
    noise = np.random.default_rng(2)

    def recomputed(text: NDArray[np.int32], n: int) -> Iterable[object]:
        other = rows * (1 + 1e-6 * noise.standard_normal(rows.shape, dtype=np.float32))  # so that no KV can be reused
        return ours(fresh, other, text, n)

    runs: dict[str, Run] = {"fedbpt": lambda text, n: ours(scorer.generator, rows, text, n), "recomputed": recomputed}
    skipped = {}
    try:
        runs["llama-cpp-python"], version = stock(scorer)
        say(f"  llama-cpp-python {version}")
    except UnavailableError as reason:
        skipped["llama-cpp-python"] = str(reason)
        say(f"  skipped llama-cpp-python: {reason}")

    say(f"{scorer!r}; {args.repeats} requests, {ROWS} prompt tokens, {args.tokens} tokens generated; medians")
    found: dict[str, list[tuple[float, float]]] = {peer: [] for peer in runs}
    for i, text in enumerate(texts_like_news(scorer, args.repeats + 1)):
        for peer, run in runs.items():
            measured = timed(run(text, args.tokens))
            if i:  # the first request creates contexts
                found[peer].append(measured)
    result: dict[str, Any] = {"model": scorer.name, "threads": scorer.n_threads, "skipped": skipped, "peers": {}}
    first, rate = (statistics.median(own) for own in zip(*found["fedbpt"], strict=True))
    for peer, measured_all in found.items():
        its_first, its_rate = (statistics.median(own) for own in zip(*measured_all, strict=True))
        ratios = f"fedbpt: {its_first / first:5.2f} times as soon, {rate / its_rate:5.2f} times as fast"
        say(f"  {peer:18} first token {its_first * 1e3:8.1f} ms, then {its_rate:7.1f} tokens/s   {ratios}")
        result["peers"][peer] = {
            "first_token_seconds": its_first,
            "tokens_per_second": its_rate,
            "first_token_ratio": its_first / first,
            "rate_ratio": rate / its_rate,
        }
    texts = texts_like_news(scorer, scorer.generator.n_places)
    rates = [together(scorer.generator, rows, texts, args.tokens) for _ in range(3)]
    many, one = (statistics.median(own) for own in zip(*rates, strict=True))
    say(f"  {len(texts)} texts at once {many:.1f} tokens/s, one by one {one:.1f}   fedbpt: {many / one:.2f} times")
    result["together"] = {"texts": len(texts), "tokens_per_second": many, "one_by_one": one, "ratio": many / one}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="name or GGUF file, repeatable (default: smollm2-135m)")
    parser.add_argument("--threads", type=int, help="for fedbpt and the peer (default: physical cores)")
    parser.add_argument("--repeats", type=int, default=15, help="number of requests")
    parser.add_argument("--tokens", type=int, default=48, help="generated per request")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    results = [bench(name, args, say) for name in args.model or ["smollm2-135m"]]
    print(json.dumps({"machine": platform.machine(), "models": [result for result in results if result]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
