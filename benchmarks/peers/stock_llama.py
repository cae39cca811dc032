"""Stock ``llama-cpp-python`` on the same GGUF, through its low-level API: the prompt is an embedding batch."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import UnavailableError

INSTALL = (
    "flags='-march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16'; CFLAGS=$flags CXXFLAGS=$flags "
    "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir --force-reinstall --no-deps llama-cpp-python"
)
"""A shell command that builds it for this CPU without AMX."""
PACK_TOKENS = 512
"""Tokens per pack of texts, one ubatch. 256, 1,024 and all texts at once were not faster."""
PACK_TEXTS = 32

Ints = NDArray[np.integer[Any]]


class StockModel:
    """A GGUF loaded by stock llama.cpp.

    Raises:
        UnavailableError: not installed, or built in a way that crashes on this CPU.
    """

    def __init__(self, path: Path, n_threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise UnavailableError("llama-cpp-python is not installed: pip install '.[bench]'") from error
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self.api: Any = llama_cpp
        self.n_threads = n_threads
        self.version: str = llama_cpp.__version__
        self.features: str = llama_cpp.llama_print_system_info().decode().strip()
        if "AMX_INT8 = 1" in self.features:
            raise UnavailableError(
                f"llama-cpp-python is built with AMX, which crashes if GCC 12 built it; rebuild: {INSTALL}"
            )
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise UnavailableError(f"llama-cpp-python cannot load {path}")
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def context(self, n_ctx: int, n_seq_max: int) -> Any:
        """Create a context of ``n_ctx`` tokens that ``n_seq_max`` sequences share."""
        params = self.api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, PACK_TOKENS)
        params.n_seq_max = n_seq_max
        params.n_threads = params.n_threads_batch = self.n_threads
        params.kv_unified = True
        params.swa_full = True
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise UnavailableError(f"llama-cpp-python cannot make a context of {n_ctx} tokens")
        return context

    def decode(self, context: Any, content: NDArray[Any], pos: Ints, seq: Ints, outputs: Sequence[int] = ()) -> None:
        """Run llama_decode on tokens int32 [n] or embeddings float32 [n, n_embd] at ``pos`` [n] of ``seq`` [n].

        ``outputs``: indices whose logits to compute.
        """
        content = np.ascontiguousarray(content)
        is_tokens = content.dtype == np.int32
        positions, seqs = pos.astype(np.int32), seq.astype(np.int32)
        seq_counts = np.ones(len(seqs), dtype=np.int32)
        seq_addresses = seqs.ctypes.data + seqs.itemsize * np.arange(len(seqs), dtype=np.uint64)
        wanted = np.zeros(len(seqs), dtype=np.int8)
        wanted[list(outputs)] = 1

        def pointer(array: NDArray[Any], kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        batch = self.api.llama_batch(
            n_tokens=len(seqs),
            token=pointer(content, ctypes.c_int32) if is_tokens else None,
            embd=None if is_tokens else pointer(content, ctypes.c_float),
            pos=pointer(positions, ctypes.c_int32),
            n_seq_id=pointer(seq_counts, ctypes.c_int32),
            seq_id=pointer(seq_addresses, ctypes.POINTER(ctypes.c_int32)),
            logits=pointer(wanted, ctypes.c_int8),
        )
        status = self.api.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of llama-cpp-python failed with status {status}")

    def prompt(self, context: Any, rows: NDArray[np.float32]) -> None:
        """Decode ``rows`` as sequence 0 of an empty cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(context), False)
        self.decode(context, rows, np.arange(len(rows)), np.zeros(len(rows), dtype=np.int32))

    def logits(self, context: Any, index: int, label_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        row = self.api.llama_get_logits_ith(context, index)
        return np.ctypeslib.as_array(row, (self.n_vocab,))[label_ids]


class OneByOne:
    """Scores one text at a time: the prompt's rows, then the text, with logits at the last position."""

    name = "llama-cpp-python, one text at a time"

    def __init__(self, model: StockModel, n_ctx: int) -> None:
        self.model = model
        self.context = model.context(n_ctx, n_seq_max=1)

    def score(
        self, prompt: NDArray[np.float32], texts: Sequence[NDArray[np.int32]], label_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        rows = []
        for text in texts:
            self.model.prompt(self.context, prompt)
            last = len(text) - 1
            self.model.decode(
                self.context, text, len(prompt) + np.arange(len(text)), np.zeros(len(text), dtype=np.int32), [last]
            )
            rows.append(self.model.logits(self.context, last, label_ids))
        return np.stack(rows)


class Packed:
    """Scores batches as far as the API allows: the prompt's KV is computed once and shared, texts are packed."""

    name = "llama-cpp-python, shared prompt, packed texts"

    def __init__(self, model: StockModel, n_ctx: int) -> None:
        self.model = model
        self.context = model.context(n_ctx + PACK_TOKENS, n_seq_max=1 + PACK_TEXTS)

    def score(
        self, prompt: NDArray[np.float32], texts: Sequence[NDArray[np.int32]], label_ids: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        api = self.model.api
        memory = api.llama_get_memory(self.context)
        self.model.prompt(self.context, prompt)
        rows: list[NDArray[np.float32]] = []
        for pack in self._packs(texts):
            seq = np.repeat(np.arange(1, len(pack) + 1), [len(text) for text in pack])
            pos = len(prompt) + np.concatenate([np.arange(len(text)) for text in pack])
            last = (np.cumsum([len(text) for text in pack]) - 1).tolist()
            for i in range(1, len(pack) + 1):
                api.llama_memory_seq_cp(memory, 0, i, -1, -1)
            self.model.decode(self.context, np.concatenate(pack), pos, seq, last)
            rows.extend(self.model.logits(self.context, index, label_ids) for index in last)
            for i in range(1, len(pack) + 1):
                api.llama_memory_seq_rm(memory, i, -1, -1)
        return np.stack(rows)

    @staticmethod
    def _packs(texts: Sequence[NDArray[np.int32]]) -> Iterator[list[NDArray[np.int32]]]:
        pack: list[NDArray[np.int32]] = []
        for text in texts:
            if pack and (sum(map(len, pack)) + len(text) > PACK_TOKENS or len(pack) == PACK_TEXTS):
                yield pack
                pack = []
            pack.append(text)
        if pack:
            yield pack
