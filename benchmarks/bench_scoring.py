"""Evaluations per second, compared with stock llama-cpp-python, PyTorch and the upper bound of the machine.

One evaluation is one candidate prompt on all texts. Three cases on AG-News-like texts of some 56 tokens:

front  50 prompt tokens before each of 64 texts. Peers compute the same.
cue    1 prompt token in place of the answer cue's last, mini-batches of 8, 16 candidates per generation, with the
       texts' KV already kept. Peers evaluate the same mini-batch in front placement with 50 prompt tokens.

layer  1 row added to the output of the middle layer at the cue's last token, on the same mini-batches; the peer is
       fedbpt in the cue.

The upper bound: the computed tokens divided by the engine's prefill rate on one text of 512 tokens. All variants are
alternated within each repeat; medians are printed, and one JSON line last.

    python benchmarks/bench_scoring.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from peers import UnavailableError
from peers.pytorch import PyTorch, converted, load_gguf
from peers.stock_llama import INSTALL, OneByOne, Packed, StockModel
from workload import alternate, label_ids, prompts, seconds, texts_like_news

import fedbpt
from fedbpt.engine.layers import middle_layer
from fedbpt.errors import ModelNotFoundError
from fedbpt.protocol.specs import Placement

MODELS = ("smollm2-135m", "gemma3-270m")
PEER_ROWS = 50
MINI_BATCH = 8
POPSIZE = 16
GENERATIONS = 200

Say = Callable[[str], None]
Texts = list[NDArray[np.int32]]


class Peer(Protocol):
    name: str

    def score(self, prompt: NDArray[np.float32], texts: Texts, label_ids: NDArray[np.int32]) -> NDArray[np.float32]: ...


class NaiveScorer:
    """fedbpt's engine with one text and one candidate per call, without sharing."""

    name = "fedbpt, one text a call"

    def __init__(self, scorer: fedbpt.NativeScorer) -> None:
        self.scorer = scorer

    def score(self, prompt: NDArray[np.float32], texts: Texts, label_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.concatenate([self.scorer.score_with_soft_prompt([text], prompt, label_ids)[0] for text in texts])


def cpu_has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " amx_int8" in cpuinfo.read_text()


def available_peers(scorer: fedbpt.NativeScorer, n_ctx: int, say: Say) -> tuple[list[Peer], dict[str, str]]:
    """The available peers, and the reasons why others are not."""
    peers: list[Peer] = [NaiveScorer(scorer)]
    skipped: dict[str, str] = {}
    try:
        stock = StockModel(scorer.path, scorer.n_threads)
        peers += [OneByOne(stock, n_ctx), Packed(stock, n_ctx)]
        say(f"  llama-cpp-python {stock.version}: {stock.features}")
        if cpu_has_amx():
            say(f"  llama-cpp-python is built without AMX, with which it crashes when built by GCC 12:\n    {INSTALL}")
    except UnavailableError as reason:
        skipped["llama-cpp-python"] = str(reason)
    try:
        model = load_gguf(scorer.path, scorer.n_threads)
        peers += [PyTorch(each, scorer.n_threads) for each in (model, converted(model, "bfloat16"))]
    except UnavailableError as reason:
        skipped["PyTorch"] = str(reason)
    for name, why in skipped.items():
        say(f"  skipped {name}: {why}")
    return peers, skipped


def compare(
    scorer: fedbpt.NativeScorer,
    peers: list[Peer],
    placement: Placement,
    texts: Texts,
    candidates: NDArray[np.float32],
    repeats: int,
) -> dict[str, Any]:
    """Evaluations per second of fedbpt and each peer in front placement, and fedbpt's share of the upper bound."""
    labels = label_ids(scorer)
    peer_prompt = prompts(scorer, 1, PEER_ROWS)[0]
    plan = scorer.compile(texts, labels, placement)
    prefill = scorer.compile(texts_like_news(scorer, 1, 512, spread=0), labels)
    no_rows = np.empty((1, 0, scorer.n_embd), dtype=np.float32)

    # Warm up buffers, caches and, in the cue, the texts' KV.
    plan.score(candidates)
    prefill.score(no_rows)
    answers = scorer.score_with_soft_prompt(texts, peer_prompt, labels)[0].argmax(axis=1)
    agreement = {
        peer.name: float(np.mean(peer.score(peer_prompt, texts, labels).argmax(axis=1) == answers)) for peer in peers
    }

    n_tokens = plan.n_tokens
    plan.score(candidates)
    n_tokens = plan.n_tokens - n_tokens
    runs: dict[str, Callable[[], object]] = {
        "fedbpt": lambda: plan.score(candidates),
        "prefill": lambda: prefill.score(no_rows),
    }
    for peer in peers:
        runs[peer.name] = partial(peer.score, peer_prompt, texts, labels)
    taken = alternate(runs, repeats)

    ours = len(candidates) / taken["fedbpt"]
    prefill_rate = 512 / taken["prefill"]
    ceiling = len(candidates) * prefill_rate / n_tokens
    rates = {peer.name: 1 / taken[peer.name] for peer in peers}
    return {
        "placement": placement,
        "texts": len(texts),
        "candidates": len(candidates),
        "prompt_tokens": candidates.shape[1],
        "tokens_per_evaluation": n_tokens / len(candidates),
        "prefill_tokens_per_second": prefill_rate,
        "evaluations_per_second": {"fedbpt": ours, **rates},
        "ratio": {name: ours / rate for name, rate in rates.items()},
        "ceiling": ceiling,
        "share_of_ceiling": ours / ceiling,
        "same_answers": agreement,
    }


def compare_layer(scorer: fedbpt.NativeScorer, texts: Texts, repeats: int) -> dict[str, Any]:
    """Evaluations per second in placement layer, against those in the cue; both with kept texts."""
    labels = label_ids(scorer)
    candidates = prompts(scorer, POPSIZE, 1)
    plans = {
        "layer": scorer.compile(texts, labels, "layer", layer=middle_layer(scorer.n_layer)),
        "cue": scorer.compile(texts, labels, "cue"),
    }
    tokens = {}
    for name, plan in plans.items():
        plan.score(candidates)
        before = plan.n_tokens
        plan.score(candidates)
        tokens[name] = (plan.n_tokens - before) / len(candidates)
    taken = alternate({name: partial(plan.score, candidates) for name, plan in plans.items()}, 4 * repeats)
    rates = {name: len(candidates) / taken[name] for name in plans}
    return {
        "placement": "layer",
        "texts": len(texts),
        "candidates": len(candidates),
        "tokens_per_evaluation": tokens,
        "evaluations_per_second": rates,
        "ratio": {"cue": rates["layer"] / rates["cue"]},
    }


def show_layer(case: dict[str, Any], say: Say) -> None:
    rates, tokens = case["evaluations_per_second"], case["tokens_per_evaluation"]
    say(f"layer: {case['texts']} texts, {case['candidates']} candidates; evaluations per second")
    for name in rates:
        say(f"  {'fedbpt, ' + name:46} {rates[name]:9.3f}   {tokens[name]:.1f} tokens")
    say(f"  layer is {case['ratio']['cue']:.2f} times as fast as the cue")


def show(case: dict[str, Any], say: Say) -> None:
    say(
        f"{case['placement']}: {case['texts']} texts, {case['candidates']} candidates, {case['prompt_tokens']} prompt "
        f"tokens each; evaluations per second"
    )
    rates = case["evaluations_per_second"]
    say(f"  {'fedbpt':46} {rates['fedbpt']:9.3f}")
    for name, ratio in case["ratio"].items():
        same = f"{case['same_answers'][name]:4.0%} same answers"
        say(f"  {name:46} {rates[name]:9.3f}   fedbpt is {ratio:7.2f} times as fast; {same}")
    say(
        f"  {'ceiling':46} {case['ceiling']:9.3f}   fedbpt reaches {case['share_of_ceiling']:.0%} "
        f"({case['tokens_per_evaluation']:.0f} tokens at {case['prefill_tokens_per_second']:.0f} tokens/s)"
    )


def tuning_run(scorer: fedbpt.NativeScorer, texts: Texts) -> float:
    """Seconds of scoring in a whole run in the cue: the texts' KV, then every generation on its mini-batch."""
    plan = scorer.compile(texts, label_ids(scorer), "cue")
    candidates = prompts(scorer, POPSIZE, 1)

    def run() -> None:
        for generation in range(GENERATIONS):
            first = generation * MINI_BATCH
            plan.score(candidates, np.arange(first, first + MINI_BATCH) % len(texts))

    return seconds(run)


def bench(name: str, args: argparse.Namespace, say: Say) -> dict[str, Any] | None:
    """All cases for one model; None if it has not been downloaded."""
    try:
        scorer = fedbpt.load_model(name, n_threads=args.threads)
    except ModelNotFoundError as error:
        say(f"skipped {name}: {error}")
        return None
    say(f"{scorer!r}; medians of {args.repeats}")
    texts = texts_like_news(scorer, args.texts)
    n_ctx = PEER_ROWS + max(map(len, texts))
    peers, skipped = available_peers(scorer, n_ctx, say)

    front, cue = prompts(scorer, args.candidates, PEER_ROWS), prompts(scorer, POPSIZE, 1)
    cases = [compare(scorer, peers, "front", texts, front, args.repeats)]
    show(cases[-1], say)
    cases.append(compare(scorer, peers, "cue", texts[:MINI_BATCH], cue, args.repeats))
    show(cases[-1], say)
    cases.append(compare_layer(scorer, texts[:MINI_BATCH], args.repeats))
    show_layer(cases[-1], say)
    result: dict[str, Any] = {"model": scorer.name, "threads": scorer.n_threads, "cases": cases, "skipped": skipped}
    if args.run if args.run is not None else scorer.name == MODELS[0]:
        result["run_seconds"] = tuning_run(scorer, texts)
        say(f"cue: {GENERATIONS * POPSIZE} evaluations x {MINI_BATCH} texts take {result['run_seconds']:.1f} s")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"name or GGUF file, repeatable (default: {MODELS})")
    parser.add_argument("--threads", type=int, help="for fedbpt and the peers (default: physical cores)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--texts", type=int, default=64, help="in front placement and in a whole run")
    parser.add_argument(
        "--candidates", type=int, default=2, help="candidates of fedbpt per repeat in front placement; peers score one"
    )
    parser.add_argument(
        "--run", action=argparse.BooleanOptionalAction, help=f"time a whole run in the cue (default: {MODELS[0]} only)"
    )
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    results = [bench(name, args, say) for name in args.model or MODELS]
    print(json.dumps({"machine": platform.machine(), "models": [result for result in results if result]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
