"""Record the graphs that unpatched upstream computes, with which tests/native/test_graph.py compares the fork's.

Run it once for each upstream release: ``python vendor/llama.cpp/record_graphs.py``. It assembles the pinned release
without overlay and patches, builds record/ against it, and writes tests/native/upstream_graphs.json. Needs cmake, and
the packages gguf and numpy for the tiny models.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import assemble

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "tests" / "native" / "upstream_graphs.json"
TOKENS = (5, 17, 42, 99, 300)
# Each architecture in both modes of the scorer: f32 weights without flash attention, others with it.
RECORDED = [(name, weights) for name in ("llama", "qwen2", "gemma3") for weights in ("f32", "q8_0")]


def pinned() -> dict[str, str]:
    """Read the pin of the release that the fork is built on."""
    pin: dict[str, str] = tomllib.loads((HERE / "UPSTREAM.toml").read_text())["upstream"]
    return pin


def pristine(cache: Path) -> Path:
    """Return the unmodified tree of the pinned release; unpack it if it is missing."""
    pin = pinned()
    tree = ROOT / "build" / f"upstream-{pin['sha256'][:12]}"
    if not tree.is_dir():
        tree.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent, prefix="unpacking-") as scratch:
            fresh = Path(scratch) / "tree"
            assemble.unpack(assemble.fetch_sdist(pin, cache), fresh)
            fresh.rename(tree)
    return tree


def build(tree: Path, folder: Path) -> Path:
    """Build the recorder against ``tree``; return its path."""
    if (tree / "include" / "llama-soft-prompt.h").exists():
        raise assemble.AssemblyError(f"{tree} is the fork: name an unpatched tree of the pinned release")
    settings = ["-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_CPP_DIR={tree}"]
    configure = ["cmake", "-S", str(HERE / "record"), "-B", str(folder), *settings]
    make = ["cmake", "--build", str(folder), "--target", "record", "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, make):
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
            raise assemble.AssemblyError(f"the recorder could not be built: see the lines above ({' '.join(command)})")
    return folder / "record"


def record(recorder: Path, name: str, weights: str, folder: Path) -> dict[str, object]:
    """Record the graph of one decode of TOKENS by a tiny model."""
    sys.path.insert(0, str(ROOT / "tests" / "native"))
    tiny_gguf = importlib.import_module("tiny_gguf")
    sys.path.pop(0)
    path = tiny_gguf.write(folder / f"{name}-{weights}.gguf", replace(tiny_gguf.MODELS[name], weights=weights))
    flash = weights != "f32"
    command = [str(recorder), str(path), "flash" if flash else "plain", *map(str, TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise assemble.AssemblyError(f"cannot record {name} {weights}: status {done.returncode} {done.stderr.strip()}")
    return {"model": name, "weights": weights, "flash_attention": flash, "nodes": done.stdout.splitlines()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("FEDBPT_BUILD_CACHE") or Path.home() / ".cache" / "fedbpt" / "build"
    parser.add_argument("--cache", type=Path, default=Path(default), help="where the source package is kept")
    parser.add_argument("--upstream", type=Path, help="an existing unpatched tree of the pinned release; no network")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "record", help="the recorder's build folder")
    args = parser.parse_args()
    try:
        tree = args.upstream.resolve() if args.upstream else pristine(args.cache)
        recorder = build(tree, args.build)
        with tempfile.TemporaryDirectory() as scratch:
            graphs = [record(recorder, name, weights, Path(scratch)) for name, weights in RECORDED]
    except (assemble.AssemblyError, OSError) as error:
        print(f"fedbpt: {error}", file=sys.stderr)
        return 1
    recorded = {"upstream": pinned()["sha256"], "tokens": TOKENS, "graphs": graphs}
    OUT.write_text(json.dumps(recorded, indent=0) + "\n")
    print(f"{OUT.relative_to(ROOT)}: {len(graphs)} graphs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
