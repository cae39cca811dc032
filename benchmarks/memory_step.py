"""Run one variant of `bench_memory.py` in this process, and print the results with the peak RSS as JSON.

Imports are inside the functions, so that packages of one variant do not count as memory of another.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peers import UnavailableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedbpt.protocol.specs import Placement

UNAVAILABLE = 3
"""Exit code if a peer is not installed; the output is the reason."""
POPSIZE = 16
MINI_BATCH = 8
EAGER = (
    "fedbpt.api",
    "fedbpt.coordinator.federation",
    "fedbpt.cli.tune",
    "fedbpt.cli.demo",
    "cma",
    "httpx",
    "matplotlib.pyplot",
    "huggingface_hub",
    "datasets",
)
RESIDENT = {"resident_own": "RssAnon", "resident_files": "RssFile"}
N_PROMPT: dict[Placement, int] = {"front": 50, "cue": 1}


def fedbpt_step(model: str, threads: int | None, texts: int, placement: Placement, candidates: int) -> dict[str, Any]:
    """One generation of CMA-ES on all texts (front) or a mini-batch (cue); ``candidates`` of its 16 are scored."""
    import workload

    import fedbpt
    from fedbpt.machine.memory import memory_of_process
    from fedbpt.objective.losses import cross_entropy
    from fedbpt.protocol.specs import PromptSpec
    from fedbpt.search.cma_es import CmaSearch
    from fedbpt.search.projection import Projection

    interpreter = memory_of_process()["rss"]
    scorer = fedbpt.load_model(model, n_threads=threads)
    labels = workload.label_ids(scorer)
    plan = scorer.compile(workload.texts_like_news(scorer, texts), labels, placement)
    spec = PromptSpec(placement=placement, n_prompt=N_PROMPT[placement])
    projection = Projection(spec, workload.prompts(scorer, 1, spec.n_prompt)[0], scorer.embedding_std)
    search = CmaSearch(spec.d, spec.sigma0, POPSIZE)
    batch = np.arange(texts if placement == "front" else min(MINI_BATCH, texts))

    began = time.perf_counter()
    logits = plan.score(projection.embeds(search.ask())[:candidates], batch)
    losses = cross_entropy(logits, batch % len(labels)).mean(axis=-1)
    search.tell(np.resize(losses, POPSIZE))
    memory = scorer.memory()
    return {
        "seconds": time.perf_counter() - began,
        "texts": len(batch),
        "candidates": len(logits),
        "weights": memory["weights"],
        "kv": memory["kv"] + plan.kv_bytes,
        "compute": memory["compute"],
        "projection": 4 * spec.d * projection.p0.size,
        "interpreter": interpreter,
        **_resident(),
        "finite": bool(np.isfinite(logits).all()),
    }


def idle_device(model: str, eager: bool) -> dict[str, Any]:
    """Memory of an idle `fedbpt device --load-late`. ``eager``: with all imports of fedbpt."""
    imported = [name for name in EAGER if eager and _can_import(name)]

    from fedbpt.cli import device as _command  # noqa: F401 - imports of the command line
    from fedbpt.device.agent import AgentService
    from fedbpt.device.agent.server import AgentServer
    from fedbpt.device.device import Device
    from fedbpt.engine.native_scorer import load_model
    from fedbpt.machine.memory import memory_of_process
    from fedbpt.tasks import load

    device = Device("idle", load_model(model, late=True), [("a text", 0)], task=load("sst-2"))
    with AgentServer(AgentService(device)):
        return {"rss": memory_of_process()["rss"], "imported": imported}


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:  # of an extra that is not installed
        return False
    return True


def _resident() -> dict[str, int]:
    """Bytes of private RSS, and of mapped files, which the system can drop (only on Linux)."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in RESIDENT.items() if key in lines}


def write_checkpoints(model: str, threads: int | None, texts: int, folder: str) -> dict[str, Any]:
    """Write the GGUF's weights as safetensors, and the texts, so that peers load neither GGUF nor fedbpt."""
    import workload
    from peers.pytorch import converted, load_gguf

    import fedbpt

    scorer = fedbpt.load_model(model, n_threads=threads)
    peer = load_gguf(scorer.path, scorer.n_threads)
    peer.save_pretrained(Path(folder) / "float32")
    converted(peer, "bfloat16").save_pretrained(Path(folder) / "bfloat16")
    sequences = workload.texts_like_news(scorer, texts)
    np.savez(
        Path(folder) / "texts.npz",
        ids=np.concatenate(sequences),
        ends=np.cumsum([len(ids) for ids in sequences]),
        labels=workload.label_ids(scorer),
        prompt=workload.prompts(scorer, 1, N_PROMPT["front"])[0],
        threads=scorer.n_threads,
    )
    return {}


def pytorch_evaluation(folder: str, dtype: Any) -> dict[str, Any]:
    """Score one candidate in front placement on all texts."""
    from peers.pytorch import PyTorch, load_checkpoint

    texts, inputs = _texts(folder)
    n_threads = int(inputs["threads"])
    peer = PyTorch(load_checkpoint(Path(folder) / dtype, dtype, n_threads), n_threads)
    began = time.perf_counter()
    peer.score(inputs["prompt"], texts, inputs["labels"])
    return {"seconds": time.perf_counter() - began, "texts": len(texts), "candidates": 1}


def peft_step(folder: str) -> dict[str, Any]:
    """Do one step of prompt tuning by back-propagation on all texts."""
    from peers.peft_tuning import tuning_step
    from peers.pytorch import load_checkpoint

    texts, inputs = _texts(folder)
    labels = inputs["labels"]
    model = load_checkpoint(Path(folder) / "float32", "float32", int(inputs["threads"]))
    targets = [int(labels[i % len(labels)]) for i in range(len(texts))]
    began = time.perf_counter()
    tuning_step(model, texts, targets, N_PROMPT["front"], MINI_BATCH)
    return {"seconds": time.perf_counter() - began, "texts": len(texts)}


def write_random_llama(path: str) -> dict[str, Any]:
    import random_llama

    random_llama.write(Path(path))
    return {}


def _texts(folder: str) -> tuple[list[NDArray[np.int32]], dict[str, Any]]:
    with np.load(Path(folder) / "texts.npz") as file:
        inputs = dict(file)
    return np.split(inputs["ids"], inputs["ends"][:-1]), inputs


VARIANTS = (fedbpt_step, idle_device, write_checkpoints, pytorch_evaluation, peft_step, write_random_llama)


def main() -> int:
    name, arguments = sys.argv[1:]
    variant = {function.__name__: function for function in VARIANTS}[name]
    try:
        result = variant(**json.loads(arguments))
    except UnavailableError as reason:
        print(reason)
        return UNAVAILABLE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**result, "peak_rss": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
