"""Cost of scoring texts under several templates, compared with a separate pass per template.

A few texts at a time are scored under all templates before the next ones, as a device does when it selects a template
or averages over several: a text under another template only costs its tail. The peer scores the same texts template by
template, with a newly loaded model each, so that nothing is shared. The logits must be the same bits.

    python benchmarks/bench_templates.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import statistics

import numpy as np
from workload import label_ids, seconds, texts_like_news

import fedbpt
from fedbpt.objective.mini_batches import TEMPLATES_SHARE

CUES = (" Topic:", " Category:", " Section:", " This article is about")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()

    scorer = fedbpt.load_model(args.model, n_threads=args.threads)
    texts, labels = texts_like_news(scorer, args.texts), label_ids(scorer)
    cues = [scorer.tokenize(cue, add_bos=False) for cue in CUES]
    none = np.zeros((1, 0, scorer.n_embd), dtype=np.float32)
    scorer.score_with_soft_prompt(texts[:1], none, labels, "cue")  # warm up
    times: dict[str, list[float]] = {"together": [], "apart": []}
    tokens, logits = {"together": 0, "apart": 0}, {}

    def together() -> np.ndarray:
        plans = [scorer.compile(texts, labels, "cue", cue=cue, keep_kv=False) for cue in cues]
        parts = [np.arange(args.texts)[i : i + TEMPLATES_SHARE] for i in range(0, args.texts, TEMPLATES_SHARE)]
        found = np.concatenate([[plan.score(none, part)[0] for plan in plans] for part in parts], axis=1)
        tokens["together"] = sum(plan.n_tokens for plan in plans)
        return found

    def apart() -> np.ndarray:
        plans = [
            each.compile(texts, labels, "cue", cue=cue, keep_kv=False)
            for each, cue in zip(strangers, cues, strict=True)
        ]
        found = np.stack([plan.score(none)[0] for plan in plans])
        tokens["apart"] = sum(plan.n_tokens for plan in plans)
        return found

    strangers: list[fedbpt.NativeScorer] = []
    for _ in range(args.repeats):
        strangers = [fedbpt.load_model(args.model, n_threads=args.threads) for _ in cues]
        for each in strangers:
            each.score_with_soft_prompt([texts[0][:2]], none, labels, "cue")
        times["apart"].append(seconds(lambda: logits.update(apart=apart())))
        strangers = []
        times["together"].append(seconds(lambda: logits.update(together=together())))
    if not np.array_equal(logits["together"], logits["apart"]):
        raise SystemExit("the logits differ: please report this")

    medians = {name: statistics.median(each) for name, each in times.items()}
    result = {"model": args.model, "texts": args.texts, "templates": len(CUES), "seconds": medians, "tokens": tokens}
    if not args.json:
        print(f"{args.texts} texts under {len(CUES)} templates, {args.model}; the same bits")
        for name in times:
            print(f"{name:9} {medians[name]:7.2f} s  {tokens[name]:7,} tokens")
        faster, fewer = medians["apart"] / medians["together"], tokens["apart"] / tokens["together"]
        print(f"{faster:.1f} times faster together, {fewer:.1f} times fewer tokens")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
