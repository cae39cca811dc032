"""Memory of a tuning step, compared with PyTorch and back-propagation in PEFT.

Each variant runs in a separate process, which reports its peak resident memory (getrusage):

fedbpt front   64 texts after 50 prompt tokens: load, compile, ask CMA-ES, project, score, tell
fedbpt cue     a mini-batch of 8 of them, 1 prompt token in the cue
PyTorch        one candidate's evaluation of the 64 texts in front placement
PEFT           a step of prompt tuning by back-propagation on the 64 texts, float32, 50 virtual tokens, gradients
               accumulated over mini-batches of 8

First the memory of an idle device without its model, compared with one that imports everything at its start.

PyTorch and PEFT load safetensors that are written from the GGUF first. Then Llama-2-7B's shape in Q2_K, on a GGUF with
random weights (speed and memory do not depend on their values): about 3 GB in --dir, and minutes; --no-llama-7b
leaves it out.

    python benchmarks/bench_memory.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memory_step
import random_llama
from peers import UnavailableError

from fedbpt import models
from fedbpt.errors import ModelNotFoundError

MODELS = ("smollm2-135m", "gemma3-270m")
WEIGHTS_ALLOWANCE = 1.15

Say = Callable[[str], None]
Result = dict[str, Any]


def run(function: Callable[..., Result], **arguments: Any) -> Result:
    """Run ``function`` of memory_step in a separate process, and return its result. Raises `UnavailableError`."""
    command = [sys.executable, memory_step.__file__, function.__name__, json.dumps(arguments)]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # deprecation warnings of the peers' libraries
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=quiet)
    if child.returncode == memory_step.UNAVAILABLE:
        raise UnavailableError(child.stdout.strip())
    child.check_returncode()
    result: Result = json.loads(child.stdout.splitlines()[-1])
    return result


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:8,.0f} MB"


def show_ours(name: str, result: Result, say: Say) -> None:
    limit = WEIGHTS_ALLOWANCE * result["weights"] + result["kv"]
    result["limit"] = limit
    say(
        f"  {name:18} {megabytes(result['peak_rss'])}   {result['peak_rss'] / limit:5.2f} of weights + 15 % + KV = "
        f"{megabytes(limit).strip()}; {result['candidates']} candidates on {result['texts']} texts in "
        f"{result['seconds']:.1f} s"
    )
    parts = {
        "stated": ("weights", "kv", "compute"),
        "besides": ("projection", "interpreter"),
        "resident at the end": tuple(memory_step.RESIDENT),
    }
    for kind, names in parts.items():
        known = [
            f"{part.removeprefix('resident_')} {megabytes(result[part]).strip()}" for part in names if part in result
        ]
        say(f"{'':21}{kind}: {', '.join(known)}")


def bench_idle(name: str, say: Say) -> dict[str, Result]:
    """Memory of a device before its model is loaded; the peer imports at the start all that any command may need."""
    say(f"an idle device before it loads {name}")
    results = {}
    for title, eager in (("fedbpt device", False), ("eager imports", True)):
        results[title] = result = run(memory_step.idle_device, model=name, eager=eager)
        with_what = f"   with {', '.join(result['imported'])}" if eager else ""
        say(f"  {title:18} {megabytes(result['rss'])}{with_what}")
    return results


def bench_model(name: str, args: argparse.Namespace, folder: Path, say: Say) -> dict[str, Result]:
    """Peak memory of fedbpt and of every peer with one model."""
    ours = {"model": name, "threads": args.threads, "texts": args.texts, "candidates": args.candidates}
    results: dict[str, Result] = {}
    say(name)
    for placement in ("front", "cue"):
        results[f"fedbpt {placement}"] = result = run(memory_step.fedbpt_step, placement=placement, **ours)
        show_ours(f"fedbpt {placement}", result, say)
    peers: dict[str, Callable[[], Result]] = {
        "PyTorch float32": lambda: run(memory_step.pytorch_evaluation, folder=str(folder), dtype="float32"),
        "PyTorch bfloat16": lambda: run(memory_step.pytorch_evaluation, folder=str(folder), dtype="bfloat16"),
        "PEFT float32": lambda: run(memory_step.peft_step, folder=str(folder)),
    }
    try:
        run(memory_step.write_checkpoints, model=name, threads=args.threads, texts=args.texts, folder=str(folder))
        for peer, measure in peers.items():
            results[peer] = result = measure()
            ratios = [result["peak_rss"] / results[f"fedbpt {placement}"]["peak_rss"] for placement in ("front", "cue")]
            say(
                f"  {peer:18} {megabytes(result['peak_rss'])}   {ratios[0]:5.2f} times fedbpt front, {ratios[1]:5.2f} "
                f"times cue; {result['seconds']:.1f} s"
            )
    except UnavailableError as reason:
        say(f"  skipped the other peers: {reason}")
        results["skipped"] = {"reason": str(reason)}
    return results


def bench_llama_7b(args: argparse.Namespace, folder: Path, say: Say) -> dict[str, Result]:
    """Peak memory of fedbpt with the 7B shape; peers do not fit on such devices."""
    say("Llama-2-7B shape, Q2_K; THE WEIGHTS ARE RANDOM: speed and memory do not depend on their values")
    path = folder / "llama-2-7b-shape-q2_k-random.gguf"
    results: dict[str, Result] = {}
    if not path.is_file():
        free = shutil.disk_usage(folder).free
        if free < 1.1 * random_llama.FILE_BYTES:
            say(f"  skipped: {folder} has {megabytes(free).strip()} free, the model needs 3 GB; choose another --dir")
            return {"skipped": {"reason": "disk"}}
        say(f"  writing {path}, 3 GB")
        try:
            run(memory_step.write_random_llama, path=str(path))
        except UnavailableError as reason:
            say(f"  skipped: {reason}")
            return {"skipped": {"reason": str(reason)}}
    try:
        for placement in ("front", "cue"):
            result = run(
                memory_step.fedbpt_step,
                model=str(path), threads=args.threads, texts=args.texts, placement=placement, candidates=1,
            )  # fmt: skip
            results[f"fedbpt {placement}"] = result
            show_ours(f"fedbpt {placement}", result, say)
    finally:
        if not args.keep:
            path.unlink()
    weights = 2 * random_llama.n_weights()
    say(f"  {'PyTorch bfloat16':18} {megabytes(weights)}   only for the weights (computed, not run)")
    return {**results, "PyTorch bfloat16": {"weights": weights, "computed": True}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"name or GGUF file, repeatable (default: {MODELS})")
    parser.add_argument("--threads", type=int, help="default: physical cores")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=2, help="number of the generation's 16 candidates to score")
    parser.add_argument("--llama-7b", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dir", type=Path, help="folder for files (default: a temporary one)")
    parser.add_argument("--keep", action="store_true", help="keep the random 7B model in --dir")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    args = parser.parse_args()
    if args.keep and not args.dir:
        parser.error("--keep needs --dir")

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    results: dict[str, Any] = {}
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        for name in args.model or MODELS:
            try:
                models.locate(name)
            except ModelNotFoundError as error:
                say(f"skipped {name}: {error}")
                continue
            if "idle device" not in results:
                results["idle device"] = bench_idle(name, say)
            results[name] = bench_model(name, args, Path(temporary), say)
        if args.llama_7b:
            results["llama-2-7b shape, random weights"] = bench_llama_7b(args, args.dir or Path(temporary), say)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
