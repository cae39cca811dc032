"""The pybind11 module over the llama.cpp fork (``src/fedbpt_native/bind_*.cpp``).

Its users are `native_scorer`, `native_generator` and `models.formats`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

class Plan:
    """A data set prepared for scoring, with the kept KV of its texts. Belongs to the engine that made it."""

    @property
    def n_texts(self) -> int: ...
    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""

    @property
    def n_kept(self) -> int:
        """Number of texts whose KV is kept."""

    @property
    def kv_bytes(self) -> int: ...

class Generator:
    """Generates texts token by token; made by `Engine.generator`. Thread-safe: calls that compute are serialised."""

    class Stream:
        """A text being generated; destroying it frees its slot."""

        def cancel(self) -> None:
            """Make the call in flight, or the next, raise `ScoringInterrupted`."""

        @property
        def n_reused(self) -> int:
            """Input tokens whose KV was reused."""

    def open(
        self,
        ids: NDArray[np.int32],
        rows: NDArray[np.float32],
        rows_at: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
        shifted: tuple[int, int, bool] | None = None,
        grammar: bytes = b"",
        n_said: int = 0,
    ) -> Stream:
        """Begin a text of ids [n]; from ``rows_at`` on, ``rows`` [n_rows, n_embd] replace their embeddings.

        ``shifted``: instead, they are added to the outputs of these layers (first, number) at token ``rows_at`` and, if
        True, at all later ones. ``grammar``: GBNF of the new text, of which the last ``n_said`` ids are the beginning;
        empty: none.

        Raises `InputError`.
        """

    @staticmethod
    def json_grammar(schema: bytes) -> str:
        """GBNF of the JSON that a JSON schema, given as JSON, allows. Raises `InputError`."""

    def next(self, stream: Stream, n_likeliest: int) -> tuple[int, float, list[tuple[int, float]]]:
        """Choose the next token; return it, its log-probability (nats), and those of the likeliest with their ids.

        Raises `ScoringInterrupted`, `InputError` if the context is full, or what a signal handler raised.
        """

    n_places: int
    """Number of texts that can be open at a time."""

    def next_all(
        self, streams: Sequence[Stream], n_likeliest: Sequence[int]
    ) -> list[tuple[int, float, list[tuple[int, float]]] | int]:
        """`next` of several streams in one pass; in the place of a token −1: it was cancelled, −2: its logits are not
        finite, −3: no token fits its grammar, −4: the context is full.
        """

    def piece(self, id: int) -> bytes:
        """Bytes that a token adds to a text."""

    def is_end(self, id: int) -> bool:
        """Whether the model ends its text with this token."""

    def text_ids(self, text: bytes) -> NDArray[np.int32]:
        """Token ids [n] of a UTF-8 text; special tokens are parsed, and BOS is added if the model uses it."""

    def chat_ids(self, messages: Sequence[tuple[bytes, bytes]]) -> NDArray[np.int32]:
        """Token ids [n] of (role, content) messages in the model's chat template. Raises `InputError`."""

    def has_special(self, text: bytes) -> bool:
        """Whether a text contains special tokens."""

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""

    @property
    def n_cells(self) -> int:
        """Current capacity of the KV cache, in tokens."""

class Engine:
    """A loaded model and its scorer. Thread-safe: calls that compute are serialised."""

    def __init__(self, path: bytes, n_threads: int, n_gpu_layers: int, gpu: str, kv_q8_0: bool) -> None:
        """Load a GGUF file. Raises `ModelFileError`, `UnsupportedModelError` or `InputError`."""

    def tokenize(self, text: bytes, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Token ids [n] of a UTF-8 text; ``add_bos`` None: as the model was trained."""

    def token_embeddings(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Input embeddings [n, n_embd], in the scale of ``embeds``."""

    def plan(
        self,
        texts: tuple[NDArray[np.int32], NDArray[np.int64]],
        label_ids: NDArray[np.int32] | None,
        cue: bool,
        prefix: NDArray[np.int32],
        continuations: tuple[NDArray[np.int32], NDArray[np.int64]],
        layers: Sequence[int],
        kv_budget_bytes: int,
        shifted: tuple[int, int, bool] | None = None,
    ) -> Plan:
        """Prepare N texts and their N·K continuations, each as ids [total] with offsets [n + 1].

        ``label_ids`` None: the whole vocabulary. ``layers``: those that `score_states` returns, ascending. ``shifted``:
        rows are added after these layers (first, number) at each text's last token, and if True at continuations.

        Arrays must be C-contiguous and are not converted. Raises `InputError`.
        """

    def score(self, plan: Plan, which: NDArray[np.int64], embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [n_candidates, n, K + n_labels] of texts ``which`` [n].

        ``embeds`` are [n_candidates, n_prompt, n_embd]. Scores are the log-probabilities of the K continuations, then
        logits. Raises `InputError`, `ScoringInterrupted` or what a signal handler raised.
        """

    def score_states(
        self, plan: Plan, which: NDArray[np.int64], embeds: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `score`, with the hidden states of the plan's layers [n_candidates, n, n_layers, n_embd].

        Raises as `score`, and `UnsupportedModelError` if llama.cpp's graph does not mark the model's layer outputs.
        """

    def generate(
        self,
        plan: Plan,
        which: NDArray[np.int64],
        embeds: NDArray[np.float32],
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
        max_tokens: int,
        stops: list[bytes],
    ) -> list[list[tuple[NDArray[np.int32], bytes]]]:
        """Continue texts: for each candidate, each text's answer, its token ids and bytes.

        Raises as `score`, and `InputError` for a plan of placement front or without all logits, or invalid settings.
        """

    def metadata(self, key: str) -> bytes | None:
        """Value of ``key`` in the model file's metadata, as text; None if it is missing."""

    def twin(self) -> Engine:
        """A new engine on the same weights, with its own threads and buffers."""

    def generator(self) -> Generator:
        """A new generator on the same weights, with its own KV cache."""

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
        """Bytes: ``weights``, ``kv``, ``compute``; ``gpu``: the part of these in a GPU's own memory."""

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
    """(name, description, memory in bytes, free memory in bytes) of each GPU that this build can use."""

def requantize_formats() -> list[str]:
    """Formats that `requantize` can write, smallest first."""

def requantize(
    source: bytes, target: bytes, format: str, n_threads: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the model ``source`` in ``format`` to ``target``; ``progress`` is called with (tensors done, total).

    On failure, a partly written ``target`` remains. Raises `InputError`, `ModelFileError`, or what ``progress`` or a
    signal handler raised.
    """

def tensor_shapes(path: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a model, in ggml's order: a matrix is (inputs, outputs).

    Raises `ModelFileError`.
    """

def model_parts(path: bytes) -> list[bytes]:
    """Files of a model in order; ``path``: any part of a split model, or the only file. Raises `ModelFileError`."""

def weight_formats(path: bytes) -> list[tuple[str, int, int]]:
    """(ggml type, parameters, bytes) of the matrices in a model's layers, most parameters first.

    Raises `ModelFileError`.
    """

def matmul_flops(type: str) -> float:
    """Measure the FLOP/s of one CPU thread multiplying 64 tokens by a matrix of a ggml type. Raises `InputError`."""

def try_alone(
    path: bytes, n_threads: int, n_gpu_layers: int, gpu: str, kv_q8_0: bool, memory_bytes: int, cpu_seconds: int
) -> None:
    """Try a model file in a process that exists only for this.

    Writes the outcome to standard output (``src/fedbpt_native/trial.h``). The process ends beyond the limits (0: no
    limit), or when llama.cpp asserts.
    """

def use_std_regex(use: bool) -> None:
    """For tests of the fork: whether this thread's pre-tokenizer uses ``std::regex``, as upstream does."""

class GraphTrace:
    """For tests of the fork: records the nodes of each graph that a small CPU context computes (see trace.h)."""

    def __init__(self, path: str, flash_attention: bool) -> None:
        """Load the model at ``path``; without flash attention its KV cache is f32. Raises `ModelFileError`."""

    def decode(self, tokens: Sequence[int], seq: int = 0, pos0: int = 0) -> list[str]:
        """Compute ``tokens`` of ``seq`` from ``pos0`` on, with logits for the last; return the graph's lines.

        Raises `InputError`.
        """

    def set_soft_prompt(self, seq: int, pos0: int, rows: NDArray[np.float32]) -> None:
        """Replace the embeddings of ``seq`` from ``pos0`` on by ``rows`` [n_rows, n_embd]. Raises `InputError`."""

    def clear_soft_prompt(self) -> None:
        """Remove all soft prompts."""

    @property
    def n_embd(self) -> int: ...
    @property
    def n_reused(self) -> int:
        """Number of graphs that were reused instead of built."""
