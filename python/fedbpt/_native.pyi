"""The pybind11 module over the llama.cpp fork (``src/fedbpt_native/bind_*.cpp``).

Its users are `native_scorer`, `native_generator` and `models.formats`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

class Plan:
    """A data set laid out for scoring; in cue placement it keeps the texts' KV. For the engine that made it."""

    @property
    def n_texts(self) -> int: ...
    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""

    @property
    def n_kept(self) -> int:
        """Texts whose KV is kept."""

    @property
    def kv_bytes(self) -> int: ...

class Generator:
    """Texts token by token; made by `Engine.generator`. Thread-safe: calls that compute wait for each other."""

    class Stream:
        """A text that is being generated; when it is gone another may take its place."""

        def cancel(self) -> None:
            """Make the call in flight, or the next, raise `ScoringInterrupted`."""

        @property
        def n_reused(self) -> int:
            """Tokens whose KV was there already as it began."""

    def open(
        self,
        ids: NDArray[np.int32],
        rows: NDArray[np.float32],
        rows_at: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
    ) -> Stream:
        """Begin a text: ids [n], from ``rows_at`` on embedded as ``rows`` [n_rows, n_embd]. Raises `InputError`."""

    def next(self, stream: Stream, n_likeliest: int) -> tuple[int, float, list[tuple[int, float]]]:
        """The next token, its log-probability, and ids and log-probabilities of the likeliest.

        Raises `ScoringInterrupted`, `InputError` where the context is full, or what a signal handler raised.
        """

    def piece(self, id: int) -> bytes:
        """What a token adds to a text."""

    def is_end(self, id: int) -> bool:
        """Whether a text ends with this token."""

    def text_ids(self, text: bytes) -> NDArray[np.int32]:
        """Token ids [n] of a text in UTF-8, its special tokens as such, with one BOS where the model wants it."""

    def chat_ids(self, messages: Sequence[tuple[bytes, bytes]]) -> NDArray[np.int32]:
        """Token ids [n] of (role, content) messages in the model's chat template. Raises `InputError`."""

    def has_special(self, text: bytes) -> bool:
        """Whether a text names special tokens."""

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""

    @property
    def n_cells(self) -> int:
        """Tokens that its KV cache has room for."""

class Engine:
    """A loaded model and its scorer. Thread-safe: calls that compute wait for each other."""

    def __init__(self, path: bytes, n_threads: int, n_gpu_layers: int, gpu: str, kv_q8_0: bool) -> None:
        """Load a GGUF file. Raises `ModelFileError`, `UnsupportedModelError` or `InputError`."""

    def tokenize(self, text: bytes, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Token ids [n] of a text in UTF-8; ``add_bos`` None: as the model was trained."""

    def token_embeddings(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows [n, n_embd], in the scale that ``embeds`` has."""

    def plan(
        self,
        texts: tuple[NDArray[np.int32], NDArray[np.int64]],
        label_ids: NDArray[np.int32] | None,
        cue: bool,
        prefix: NDArray[np.int32],
        continuations: tuple[NDArray[np.int32], NDArray[np.int64]],
        layers: Sequence[int],
        kv_budget_bytes: int,
    ) -> Plan:
        """Lay out N texts and their N·K continuations, each as ids [total] with offsets [n + 1].

        ``label_ids`` None: all of the vocabulary. ``layers``: those that `score_states` reads, ascending.

        Arrays are C-contiguous and never converted. Raises `InputError`.
        """

    def score(self, plan: Plan, which: NDArray[np.int64], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n_candidates, n, K + n_labels] of texts ``which`` [n] under ``embeds`` [n_candidates, n_prompt, n_embd].

        Log-probabilities of the K continuations, then logits.
        Raises `InputError`, `ScoringInterrupted` or what a signal handler raised.
        """

    def score_states(
        self, plan: Plan, which: NDArray[np.int64], embeds: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What `score` returns, and the states of the plan's layers [n_candidates, n, n_layers, n_embd].

        Raises as `score`, and `UnsupportedModelError` where llama.cpp's graph does not say where a layer ends.
        """

    def metadata(self, key: str) -> bytes | None:
        """What the model file says under ``key``, as text; None: nothing."""

    def twin(self) -> Engine:
        """A new one, of the same weights, with threads and buffers of its own."""

    def generator(self) -> Generator:
        """A new one, with a KV cache of its own."""

    def interrupt(self) -> None:
        """Make the scoring call in flight raise `ScoringInterrupted`."""

    @property
    def shares_beginnings(self) -> bool: ...
    @property
    def embedding_scale(self) -> float: ...
    @property
    def notes(self) -> list[str]: ...
    def embedding_std(self) -> float:
        """Standard deviation over the whole token embedding table."""

    def memory(self) -> dict[str, int]:
        """Bytes: ``weights``, ``kv``, ``compute``; ``gpu``: what of these lies in a GPU's own memory."""

    @property
    def n_embd(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def architecture(self) -> str: ...
    @property
    def description(self) -> str: ...

def gpus() -> list[tuple[str, str, int, int]]:
    """(name, description, bytes of memory, bytes of it that are free) of the GPUs that this build can use."""

def requantize_formats() -> list[str]:
    """The formats that `requantize` knows, smallest first."""

def requantize(
    source: bytes, target: bytes, format: str, n_threads: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the model ``source`` in ``format`` to ``target``; ``progress`` gets tensors done and in total.

    What is written remains where it fails. Raises `InputError`, `ModelFileError`, or what ``progress`` or a signal
    handler raised.
    """

def tensor_shapes(path: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in a model file, the inputs of a matrix first. Raises `ModelFileError`."""

def model_parts(path: bytes) -> list[bytes]:
    """The files of a model in order, where one may be split: any part is given. Raises `ModelFileError`."""

def weight_formats(path: bytes) -> list[tuple[str, int, int]]:
    """(ggml type, parameters, bytes) of the matrices in a model's layers, most parameters first.

    Raises `ModelFileError`.
    """

def matmul_flops(type: str) -> float:
    """FLOP/s of one CPU thread multiplying 64 tokens by a matrix of a ggml type, measured. Raises `InputError`."""

def try_alone(
    path: bytes, n_threads: int, n_gpu_layers: int, gpu: str, kv_q8_0: bool, memory_bytes: int, cpu_seconds: int
) -> None:
    """Try a model file in this process, which is there for nothing else.

    What comes of it is written to standard output (``src/fedbpt_native/trial.h``). Beyond the limits, 0 for none, or
    where llama.cpp asserts, the process ends.
    """

def use_std_regex(use: bool) -> None:
    """For the fork's tests: whether this thread splits texts into words as upstream does, by ``std::regex``."""

class GraphTrace:
    """For the fork's tests: the nodes of each graph that a small CPU context computes, in the form of trace.h."""

    def __init__(self, path: str, flash_attention: bool) -> None:
        """Load the model at ``path``; without flash attention its KV cache is f32. Raises `ModelFileError`."""

    def decode(self, tokens: Sequence[int], seq: int = 0, pos0: int = 0) -> list[str]:
        """The lines of the one graph that computes ``tokens`` of ``seq`` from ``pos0`` on, logits for the last.

        Raises `InputError`.
        """

    def set_soft_prompt(self, seq: int, pos0: int, rows: NDArray[np.float32]) -> None:
        """Embed the tokens of ``seq`` at ``pos0`` and after it as ``rows`` [n_rows, n_embd]. Raises `InputError`."""

    def clear_soft_prompt(self) -> None:
        """Embed all tokens as themselves again."""

    @property
    def n_embd(self) -> int: ...
    @property
    def n_reused(self) -> int:
        """How many graphs were run again rather than built anew."""
