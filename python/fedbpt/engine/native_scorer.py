"""The `Scorer` that runs on the llama.cpp fork."""

from __future__ import annotations

import os
import secrets
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt import models
from fedbpt.argument_types import as_array, checked
from fedbpt.checking import printable, utf8
from fedbpt.engine.layers import check_layers, shifted_layers
from fedbpt.engine.native_generator import NativeGenerator
from fedbpt.engine.text_generator import GREEDY, SEEDS, Answer, Sampling
from fedbpt.engine.token_arrays import flat_continuations, prompt_rows, ragged, token_ids
from fedbpt.errors import InputError, ModelWarning
from fedbpt.machine.info import physical_cores
from fedbpt.machine.interrupts import interruptible
from fedbpt.machine.memory import memory_of_process
from fedbpt.models.headers import Sizes, sizes_of
from fedbpt.models.trial import TrialSettings, run_once
from fedbpt.protocol.specs import Placement
from fedbpt.quantities import GpuLayers, NaturalInt, PositiveInt, Threads

if TYPE_CHECKING:
    from fedbpt import _native

KVType = Literal["f16", "q8_0"]

DEFAULT_KV_BUDGET_BYTES = 512 * 2**20
"""Default KV budget of a plan: enough for about 250 texts of 90 tokens with a model of 135M parameters."""


@checked
@interruptible()
def load_model(
    name_or_path: str | os.PathLike[str],
    n_threads: Threads | None = None,
    n_gpu_layers: GpuLayers = 0,
    *,
    gpu: str | None = None,
    kv_budget_bytes: NaturalInt = DEFAULT_KV_BUDGET_BYTES,
    kv_type: KVType = "f16",
    late: bool = False,
) -> NativeScorer:
    """Load a model for scoring.

    A file is first loaded in a child process, once, since a damaged file may crash the process that loads it
    (`fedbpt.models.trial`).

    Args:
        name_or_path: a pulled model's name in the catalogue (``fedbpt models list``), or a GGUF file; for a split
            model, any of its parts.
        n_threads: compute threads; None: the number of physical cores available to this process.
        n_gpu_layers: layers to offload to the GPU, in builds with a GPU backend; -1: all.
        gpu: name of one of `gpus`; None: use all.
        kv_budget_bytes: maximum size of the KV that a plan (`NativeScorer.compile`) keeps, in bytes.
        kv_type: ``q8_0`` fits twice as many texts into the same memory; it rounds logits (docs/engine.md).
        late: load the weights at first use; errors about the file are then raised there.

    Raises:
        ModelNotFoundError: no such name, not pulled yet, or no such file.
        ModelFileError: not a GGUF file, truncated, damaged or inconsistent, or a part of it is missing.
        UnsupportedModelError: no causal decoder, or an architecture that soft prompts do not work with.
        InputError: no or too many threads, GPU layers without a GPU (of that name), a ``kv_type`` whose block size
            does not divide the model's attention heads.

    Warns:
        ModelWarning: llama.cpp's computation differs from the reference implementation (`NativeScorer.notes`).
    """
    path = models.locate(Path(name_or_path) if isinstance(name_or_path, os.PathLike) else name_or_path)
    return NativeScorer(path, str(name_or_path), n_threads, n_gpu_layers, gpu, kv_budget_bytes, kv_type, late)


class Gpu(NamedTuple):
    """A GPU that this build of fedbpt can use."""

    name: str
    description: str
    memory_bytes: int
    free_bytes: int


def gpus() -> tuple[Gpu, ...]:
    """List the GPUs of this machine that this build has a backend for (docs/backends.md)."""
    from fedbpt import _native

    return tuple(Gpu(*found) for found in _native.gpus())


def _engine(path: Path, settings: TrialSettings) -> _native.Engine:
    """Load a model after its trial load."""
    from fedbpt import _native  # imported here to save memory on a device that has no work yet

    run_once(path, settings)
    q8_0 = settings.kv_type == "q8_0"
    return _native.Engine(os.fsencode(path), settings.n_threads, settings.n_gpu_layers, settings.gpu or "", q8_0)


_scorers: weakref.WeakSet[NativeScorer] = weakref.WeakSet()


def _after_fork() -> None:
    for scorer in list(_scorers):
        scorer._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _twin(engine: _native.Engine, on_gpu: bool) -> _native.Engine:
    """Make the engine of a forked process from ``engine`` of its parent."""
    if on_gpu:
        raise InputError("a model on a GPU cannot be used after a fork: load it in the child process")
    return engine.twin()


class NativeScorer:
    """A frozen GGUF model that scores texts under soft prompts (`fedbpt.engine.scorer.Scorer`).

    Thread-safe. Usable after a fork, except on a GPU: the child shares the weights and starts its own threads.
    Unpickling loads the model again from its file.
    """

    @checked
    def __init__(
        self,
        path: Path,
        name: str | os.PathLike[str] | None = None,
        n_threads: Threads | None = None,
        n_gpu_layers: GpuLayers = 0,
        gpu: str | None = None,
        kv_budget_bytes: NaturalInt = DEFAULT_KV_BUDGET_BYTES,
        kv_type: KVType = "f16",
        late: bool = False,
    ) -> None:
        self.path = path
        name = None if name is None else os.fspath(name)
        self.name = printable(path.stem if name and name.endswith(".gguf") else name or path.stem)
        self.kv_budget_bytes = kv_budget_bytes
        self._given = name or str(path)
        self._settings = (path, name, n_threads, n_gpu_layers, gpu, kv_budget_bytes, kv_type)
        self._n_gpu_layers = n_gpu_layers
        self._gpu = gpu
        threads = physical_cores() if n_threads is None else n_threads
        self._load: Callable[[], _native.Engine] = partial(
            _engine, path, TrialSettings(threads, n_gpu_layers, gpu, kv_type)
        )
        self._loading = threading.Lock()
        self._files = models.WatchedFiles(path)
        self._loaded: _native.Engine | None = None
        self._embedding_std: float | None = None
        self._noted = False
        self._in_flight: list[_native.Plan] = []
        self._interrupted_by_fork: list[_native.Plan] = []
        _scorers.add(self)
        if not late:
            self._load_once()

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeScorer, (*self._settings, True)

    def _after_fork(self) -> None:
        """Reset what depends on the parent's threads: locks, calls in flight, and the engine's thread pool."""
        self._loading = threading.Lock()
        self._interrupted_by_fork += self._in_flight
        self._in_flight = []
        self.__dict__.pop("generator", None)
        if self._loaded is not None:
            self._load = partial(_twin, self._loaded, bool(self._n_gpu_layers))
            self._loaded = None

    def __repr__(self) -> str:
        return f"<NativeScorer {self.name}: {self._engine.description}, {self.n_threads} threads, {self.backend}>"

    @property
    def _engine(self) -> _native.Engine:
        return self._loaded or self._load_once()

    def _load_once(self) -> _native.Engine:
        with self._loading:
            if self._loaded is None:
                with self._files.unchanged():
                    loaded = self._load()
                self._loaded = loaded
                if not self._noted:
                    for note in loaded.notes:
                        warnings.warn(f"{self.name}: {note}", ModelWarning, stacklevel=2)
                self._noted = True
            return self._loaded

    @property
    def n_embd(self) -> int:
        return self._sizes.n_embd or int(self._engine.n_embd) if self._loaded is None else int(self._loaded.n_embd)

    @property
    def n_layer(self) -> int:
        return self._sizes.n_layer or int(self._engine.n_layer) if self._loaded is None else int(self._loaded.n_layer)

    @cached_property
    def _sizes(self) -> Sizes:
        """By the file's header: a late model is not loaded to describe it."""
        return sizes_of(models.model_parts(self.path)[0] if "-of-" in self.path.name else self.path)

    @property
    def n_vocab(self) -> int:
        return int(self._engine.n_vocab)

    @property
    def n_ctx_train(self) -> int:
        """The longest sequence that the model was trained on, in tokens."""
        return int(self._engine.n_ctx_train)

    @property
    def n_threads(self) -> int:
        return int(self._engine.n_threads)

    @property
    def architecture(self) -> str:
        return str(self._engine.architecture)

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences of llama.cpp from the reference implementation, a sentence each; empty before a late load."""
        return tuple(self._loaded.notes) if self._loaded is not None else ()

    @property
    def embedding_scale(self) -> float:
        """Factor applied to token embeddings before the first layer; soft prompt rows are inserted after it."""
        return float(self._engine.embedding_scale)

    @property
    def backend(self) -> str:
        if not self._n_gpu_layers:
            return "cpu"
        layers = "all" if self._n_gpu_layers < 0 else self._n_gpu_layers
        return f"{self._gpu or 'gpu'} ({layers} layers)"

    @property
    def fingerprint(self) -> str:
        """``sha256:…`` of the model's files as loaded. Raises `ModelFileError` if they have changed since."""
        return self._files.fingerprint

    @property
    def shares_beginnings(self) -> bool:
        """False before a late model is loaded, which at worst makes an estimate too high."""
        return self._loaded is not None and bool(self._loaded.shares_beginnings)

    @property
    def embedding_std(self) -> float:
        """Standard deviation over all entries of the token embedding table, after the model's embedding scale."""
        if self._embedding_std is None:
            with self._files.unchanged():
                self._embedding_std = float(self._engine.embedding_std())
        return self._embedding_std

    @checked
    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Token ids [n]. ``add_bos`` None: as the model was trained. Special tokens in ``text`` are plain text."""
        ids: NDArray[np.int32] = self._engine.tokenize(utf8(text, "text"), add_bos)
        return ids

    @checked
    def token_embeddings(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Input embeddings [len(ids), n_embd] of tokens, in the scale of soft prompt rows."""
        with self._files.unchanged():
            rows: NDArray[np.float32] = self._engine.token_embeddings(token_ids(ids, "ids"))
        return rows

    @checked
    def compile(
        self,
        texts: Sequence[str | ArrayLike],
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: str | ArrayLike | None = None,
        cue: str | ArrayLike | None = None,
        *,
        continuations: Sequence[Sequence[ArrayLike]] | None = None,
        layers: Sequence[int] | None = None,
        layer: int | None = None,
        keep_kv: bool = True,
    ) -> NativePlan:
        """Prepare a data set for repeated scoring.

        In ``cue`` placement the plan keeps each text's KV when it is first scored, up to the scorer's
        ``kv_budget_bytes`` (`NativePlan.n_kept` texts fit): from then on a candidate costs n_prompt tokens per text.
        The KV of other texts is computed again in each call.

        Strings are tokenized. BOS, if the model uses it, precedes the prefix, or each text if there is no prefix.

        Args:
            texts: N texts, each a string or token ids.
            label_ids, placement, prefix: as for `score_with_soft_prompt`.
            cue: appended to each text ("\\nTopic:"), a string or token ids.
            continuations: for each of the N texts, K token-id sequences to score; None: none. Their
                log-probabilities, in nats, come before the logits; ``label_ids`` None then means no logits.
            layers: layers whose hidden states `NativePlan.states` returns, ascending from 0; None: none. With them,
                ``label_ids`` may be empty: no logits.
            layer: for placement ``layer``: the one to whose output the row is added, from 0.
            keep_kv: False for a single pass over the texts: their KV is not kept.

        Raises:
            InputError: as `score_with_soft_prompt`, except for ``embeds``.
        """
        after = self._ids([] if cue is None else cue, "cue", add_bos=False)
        before = self._ids([] if prefix is None else prefix, "prefix")
        add_bos = None if prefix is None else False
        for i, text in enumerate(texts):
            if isinstance(text, str) and not text:
                raise InputError(f"text {i} is empty: leave it out", field="texts")
        tokens = [self._ids(text, f"text {i}", add_bos) for i, text in enumerate(texts)]
        ids = ragged([np.concatenate([text, after]) if len(text) else text for text in tokens])
        follow = ragged(flat_continuations(continuations, len(tokens)))
        if label_ids is None and continuations is not None:
            label_ids = []
        labels = None if label_ids is None else token_ids(label_ids, "label_ids")
        chosen_layers = () if layers is None else check_layers(layers, self.n_layer)
        shifted = shifted_layers(placement, layer, self.n_layer)
        with self._files.unchanged():
            plan = self._engine.plan(
                ids,
                labels,
                placement == "cue",
                before,
                follow,
                list(chosen_layers),
                self.kv_budget_bytes if keep_kv else 0,
                shifted,
            )
        return NativePlan(self, plan, chosen_layers)

    @checked
    @interruptible()
    def score_with_soft_prompt(
        self,
        tokens: Sequence[ArrayLike],
        embeds: ArrayLike,
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: ArrayLike | None = None,
        layer: int | None = None,
    ) -> NDArray[np.float32]:
        """Logits [n_candidates, len(tokens), n_labels] at each text's last position under each candidate prompt.

        Args:
            tokens: N token-id sequences.
            embeds: float32 [n_candidates, n_prompt, n_embd], or [n_prompt, n_embd] for one candidate. n_prompt
                may be 0: no soft prompt.
            label_ids: token ids whose logits to return; None: all n_vocab.
            placement: ``front``: prefix, then the rows, then the text. ``cue``: prefix, then the text, with the
                rows in place of the text's last n_prompt tokens. ``layer``: the one row is added to the output of
                ``layer`` at the text's last token. ``layers``: n_layer rows, each added to the output of its layer, at
                the text's last token and those of continuations. Zeros are no prompt, bit for bit.
            prefix: token ids before everything, shared by all texts (BOS, an instruction).
            layer: for placement ``layer``, from 0.

        A candidate's logits do not depend on other candidates or earlier calls, and are reproducible bit for bit.

        Raises:
            InputError: wrong n_embd, NaN or infinity, an empty text, a text longer than the context, a token id
                outside the vocabulary.
            ScoringInterrupted: `interrupt` was called.
            KeyboardInterrupt: Ctrl-C, after at most one graph.
        """
        return self.compile(tokens, label_ids, placement, prefix, layer=layer, keep_kv=False).score(embeds)

    @cached_property
    def generator(self) -> NativeGenerator:
        """Text generator on these weights, with its own KV cache."""
        return NativeGenerator(self._engine, self._files)

    def interrupt(self) -> None:
        """Make the scoring call in flight, on whatever thread, raise `ScoringInterrupted`."""
        if self._loaded is not None:
            self._loaded.interrupt()

    def memory(self) -> Mapping[str, int]:
        """Bytes: ``weights``, ``kv`` and ``compute`` buffers of the engine; ``rss`` and ``peak_rss`` of the process."""
        buffers = {"weights": 0, "kv": 0, "compute": 0} if self._loaded is None else self._loaded.memory()
        return {**buffers, **memory_of_process()}

    @interruptible()
    def score_plan(self, plan: _native.Plan, embeds: ArrayLike, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Implement `NativePlan.score`."""
        rows = prompt_rows(embeds, self.n_embd)
        with self._scoring(plan) as engine:
            logits: NDArray[np.float32] = engine.score(plan, indices, rows)
        return logits

    @interruptible()
    def score_plan_states(
        self, plan: _native.Plan, embeds: ArrayLike, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Implement `NativePlan.score_states`."""
        rows = prompt_rows(embeds, self.n_embd)
        with self._scoring(plan) as engine:
            logits: NDArray[np.float32]
            states: NDArray[np.float32]
            logits, states = engine.score_states(plan, indices, rows)
        return logits, states

    @interruptible()
    def continue_plan(
        self,
        plan: _native.Plan,
        embeds: ArrayLike,
        indices: NDArray[np.int64],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
    ) -> list[list[Answer]]:
        """Implement `NativePlan.generate`."""
        if sampling.grammar:
            raise InputError("a grammar holds for one text at a time: generate with scorer.generator", field="grammar")
        rows = prompt_rows(embeds, self.n_embd)
        seed = secrets.randbelow(SEEDS) if sampling.seed is None else sampling.seed % SEEDS
        with self._scoring(plan) as engine:
            found = engine.generate(
                plan,
                indices,
                rows,
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                seed,
                max_tokens,
                [utf8(each, "stop") for each in stop],
            )
        return [[Answer(text.decode(errors="replace"), ids) for ids, text in of_candidate] for of_candidate in found]

    @contextmanager
    def _scoring(self, plan: _native.Plan) -> Iterator[_native.Engine]:
        """The engine, while ``plan`` is scored: a fork in between, or a changed file, is noticed."""
        if plan in self._interrupted_by_fork:
            raise InputError("this plan was being scored when the process was forked: compile it again in the child")
        engine = self._engine
        self._in_flight.append(plan)
        try:
            with self._files.unchanged():
                yield engine
        finally:
            self._in_flight.remove(plan)

    @cached_property
    def weight_formats(self) -> tuple[models.WeightFormat, ...]:
        """Storage formats of the layers' matrices, most parameters first."""
        with self._files.unchanged():
            return models.weight_formats(self.path)

    @cached_property
    def hint(self) -> str | None:
        """One line of advice if another weight format would be much faster on this CPU, else None.

        The first access measures the CPU's matrix kernels, about 30 ms each.
        """
        if self._n_gpu_layers:
            return None
        return models.faster_format(self._given, self.weight_formats)

    def _ids(self, text: str | ArrayLike, name: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        if not isinstance(text, str):
            return token_ids(text, name)
        utf8(text, name)
        return self.tokenize(text, add_bos)


class NativePlan:
    """A data set prepared by `NativeScorer.compile` (`fedbpt.engine.scorer.Plan`)."""

    def __init__(self, scorer: NativeScorer, plan: _native.Plan, layers: Sequence[int] = ()) -> None:
        self._scorer = scorer
        self._plan = plan
        self.layers = tuple(layers)

    @property
    def n_texts(self) -> int:
        return int(self._plan.n_texts)

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed for this plan so far."""
        return int(self._plan.n_tokens)

    @property
    def n_kept(self) -> int:
        """Number of texts whose KV is kept."""
        return int(self._plan.n_kept)

    @property
    def kv_bytes(self) -> int:
        """Size of the kept KV in bytes."""
        return int(self._plan.kv_bytes)

    @checked
    def score(self, embeds: ArrayLike, indices: ArrayLike | None = None) -> NDArray[np.float32]:
        """Logits [n_candidates, n, n_labels] of the texts ``indices`` [n] (None: all) under each candidate prompt.

        With continuations, [n_candidates, n, K + n_labels]: their log-probabilities in nats, then the logits.

        Raises as `NativeScorer.score_with_soft_prompt`, and InputError for an index outside the plan.
        """
        return self._scorer.score_plan(self._plan, embeds, self._chosen(indices))

    @checked
    def score_states(
        self, embeds: ArrayLike, indices: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `score`, with the hidden states of the plan's layers [n_candidates, n, n_layers, n_embd], in one pass.

        A hidden state is the output of layer l at a text's last token, before the next layer's norm: element l + 1 of
        ``hidden_states`` in Hugging Face's transformers, except that the last layer's is taken before the final norm.

        Raises as `score`; InputError if the plan was compiled without ``layers``; UnsupportedModelError if llama.cpp's
        graph does not mark the layer outputs of this architecture.
        """
        if not self.layers:
            raise InputError("the plan has no layers: compile it with layers=(…)", field="layers")
        return self._scorer.score_plan_states(self._plan, embeds, self._chosen(indices))

    @checked
    def states(self, indices: ArrayLike | None = None, embeds: ArrayLike | None = None) -> NDArray[np.float32]:
        """Hidden states [n, n_layers, n_embd] of the plan's layers at the last token of the texts ``indices`` [n].

        ``indices`` None: all. With candidate prompts ``embeds`` [n_candidates, n_prompt, n_embd], the result is
        [n_candidates, n, n_layers, n_embd]. Raises as `score_states`.
        """
        if embeds is not None:
            return self.score_states(embeds, indices)[1]
        found: NDArray[np.float32] = self.score_states(np.zeros((1, 0, self._scorer.n_embd), np.float32), indices)[1][0]
        return found

    @checked
    def generate(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        sampling: Sampling = GREEDY,
        *,
        max_tokens: PositiveInt = 64,
        stop: Sequence[str] = (),
    ) -> list[list[Answer]]:
        """Continue the texts ``indices`` [n] (None: all) under each candidate prompt: answers [n_candidates][n].

        Up to 128 continue at a time, on shared KV of the texts. An answer ends at ``max_tokens``, at the model's end of
        text or before one of the strings ``stop``, and leaves.

        With ``sampling`` of temperature 0, an answer does not depend on others or on earlier calls (with weights of
        float32, up to rounding). Else each text has random numbers of its own, the same under all candidates and, with
        a seed, in all calls.

        Args:
            embeds: as for `score`; n_prompt may be 0: the model as it is.

        Raises as `score`, and InputError for a plan of placement ``front``, or not compiled with ``label_ids`` None.
        """
        return self._scorer.continue_plan(self._plan, embeds, self._chosen(indices), sampling, max_tokens, stop)

    def _chosen(self, indices: ArrayLike | None) -> NDArray[np.int64]:
        chosen = np.arange(self.n_texts) if indices is None else as_array(indices, "indices")
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise InputError(
                f"indices must be a flat sequence of integers, got {chosen.dtype} {list(chosen.shape)}", field="indices"
            )
        return np.ascontiguousarray(chosen, dtype=np.int64)

    def __repr__(self) -> str:
        return f"<NativePlan of {self.n_texts} texts, KV of {self.n_kept} kept in {self.kv_bytes / 1e6:.0f} MB>"
