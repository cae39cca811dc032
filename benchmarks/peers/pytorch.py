"""Hugging Face transformers on PyTorch: ``inputs_embeds``, batched with padding, as in FedBPT's reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peers import UnavailableError

Dtype = Literal["float32", "bfloat16"]

BATCH = 8
"""Texts per forward pass, sorted by length to reduce padding; 16 and 32 took 10 to 30 % longer on two cores."""


def load_gguf(path: Path, n_threads: int) -> Any:
    """Load the GGUF's weights as a float32 transformers model.

    Raises:
        UnavailableError: a package is missing, or transformers cannot read this GGUF.
    """
    try:
        import gguf  # noqa: F401  transformers reads the file with it
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed: pip install '.[bench]'") from error
    model = _load(path.parent, "float32", n_threads, gguf_file=path.name)
    del model.config.quantization_config  # the weights are already float32
    return converted(model, "float32")


def load_checkpoint(folder: Path, dtype: Dtype, n_threads: int) -> Any:
    """A transformers model from safetensors. Raises as `load_gguf`."""
    return _load(folder, dtype, n_threads)


def _load(folder: Path, dtype: Dtype, n_threads: int, **options: str) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the files are local
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed: pip install '.[bench]'") from error
    torch.set_num_threads(n_threads)
    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    except (ValueError, NotImplementedError, OSError) as error:
        raise UnavailableError(f"transformers cannot load {folder}: {error}") from error
    return model.eval()


def converted(model: Any, dtype: Dtype) -> Any:
    """A copy in ``dtype``, as transformers makes one: the rotary frequencies stay float32."""
    import torch
    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_config(model.config, dtype=getattr(torch, dtype))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


class PyTorch:
    """Texts sorted by length and padded on the right, where causal attention needs no mask for the padding.

    The output layer is only computed for the last positions and the label words.
    """

    def __init__(self, model: Any, n_threads: int) -> None:
        import torch

        self.name = f"PyTorch {str(model.dtype).removeprefix('torch.')}"
        self.model = model
        # oneDNN releases the AMX tiles of its thread, but ggml relies on its own configuration of them.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(n_threads,))

    def score(
        self, prompt: NDArray[np.float32], texts: Sequence[NDArray[np.int32]], label_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        return self._thread.submit(self._score, prompt, texts, label_ids).result()

    def _score(
        self, prompt: NDArray[np.float32], texts: Sequence[NDArray[np.int32]], label_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        import torch

        order = np.argsort([len(text) for text in texts], kind="stable")
        logits = np.empty((len(texts), len(label_ids)), dtype=np.float32)
        with torch.inference_mode():
            head = self.model.lm_head.weight[torch.from_numpy(label_ids).long()]
            rows = torch.from_numpy(prompt).to(head.dtype)
            for start in range(0, len(texts), BATCH):
                chosen = order[start : start + BATCH]
                hidden = self._last_hidden(rows, [texts[i] for i in chosen])
                logits[chosen] = (hidden @ head.T).float().numpy()
        return logits

    def _last_hidden(self, prompt: Any, texts: Sequence[NDArray[np.int32]]) -> Any:
        import torch

        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.zeros((len(texts), int(lengths.max())), dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.from_numpy(text)
        embeds = self.model.get_input_embeddings()(ids)
        inputs = torch.cat([prompt.expand(len(texts), -1, -1), embeds], dim=1)
        hidden = self.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(texts)), len(prompt) + lengths - 1]
