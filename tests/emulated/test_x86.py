"""The wheel for x86-64 on emulated processors; ``make test-wheel`` sets them up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

BOARDS = os.environ.get("FEDBPT_X86_BOARDS", "")
pytestmark = [
    pytest.mark.skipif(not BOARDS, reason="needs emulated processors: make test-wheel"),
    pytest.mark.timeout(600),
]

SCORES = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import tiny_gguf
from dataclasses import replace
from pathlib import Path
from reference import Reference
import fedbpt

model = replace(tiny_gguf.MODELS["llama"], weights="f16")
path = tiny_gguf.write(Path({folder!r}) / "tiny.gguf", model)
embeds = np.random.default_rng(0).normal(0, 0.1, (2, 3, model.n_embd)).astype(np.float32)
texts = [np.arange(5, 25, dtype=np.int32)]
scored = fedbpt.load_model(path, 1).score_with_soft_prompt(texts, embeds, [3, 4], "cue")
print(np.abs(scored - Reference(path).score(texts, embeds, [3, 4], "cue")).max())
"""


@pytest.mark.parametrize(("cpu", "code"), [("Nehalem", "sse42"), ("Haswell", "haswell")])
def test_each_processor_uses_its_own_variant(tmp_path: Path, cpu: str, code: str) -> None:
    python = Path(BOARDS).resolve() / cpu / "python"
    script = SCORES.format(tests=str(Path(__file__).parents[1] / "native"), folder=str(tmp_path))
    environment = {**os.environ, "FEDBPT_LLAMA_LOG": "1"}
    done = subprocess.run([python, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fedbpt/libggml-cpu-{code}.so" in done.stderr
    assert float(done.stdout) < 0.02
