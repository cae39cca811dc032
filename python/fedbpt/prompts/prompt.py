"""The prompt artefact: a tuned soft prompt with everything needed to use it, in one safetensors file.

Tensors: ``rows`` float32 [n_prompt, n_embd], ``label_bias`` float32 [n_labels]; with a readout also ``word_ids`` int32
[n_words] and ``word_weights`` float32 [n_words, n_labels]; with other templates also ``other_weights`` float32
[n_others, 1 + n_words, n_labels]. In format 3, instead of these, ``layer_weights`` float16 [n_templates, n_layers,
n_embd, n_labels] and ``word_scales`` float32 [n_templates] (`fedbpt.protocol.specs.LayerReadout`).

The file's metadata has one key, ``fedbpt``: a JSON object with a format number, the `PromptSpec`, the task, template,
model and history. Files of format 1 have only the task's name and labels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from fedbpt.argument_types import array_of, checked
from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import from_json
from fedbpt.errors import InputError, PromptError, WireError
from fedbpt.html_tables import html_table
from fedbpt.machine.files import write_whole
from fedbpt.prompts.model_card import model_card, use_in_fedbpt
from fedbpt.protocol.specs import Array, Dtype, LayerReadout, PromptSpec, Readout, Template
from fedbpt.quantities import NaturalInt
from fedbpt.tasks import BUILTIN, Task

FORMAT = 2
"""Version of the file format that is written, unless the prompt has a layer readout."""

LAYERS_FORMAT = 3
"""Version of the file format of prompts with a layer readout, which older versions refuse."""

SHIFTS_FORMAT = 4
"""Version of the file format of prompts that shift layers, with a layer readout or without."""

_READABLE_FORMATS = (1, FORMAT, LAYERS_FORMAT, SHIFTS_FORMAT)

_KEY = "fedbpt"
_TENSORS = {"rows", "label_bias"}
_READOUT_TENSORS = {"word_ids", "word_weights"}
_OTHERS_TENSORS = {*_READOUT_TENSORS, "other_weights"}
_LAYERS_TENSORS = {"layer_weights", "word_scales"}
_LAYERS_FIELDS = ("layers", "layer_templates")
_TENSOR_SETS = (_TENSORS, _TENSORS | _READOUT_TENSORS, _TENSORS | _OTHERS_TENSORS, _TENSORS | _LAYERS_TENSORS)
_METADATA_FIELDS = (
    "spec",
    "task_name",
    "labels",
    "template",
    "model_fingerprint",
    "model_name",
    "architecture",
    "history",
    "others",
    "task",
)


class Model(Protocol):
    """The attributes of a `fedbpt.engine.scorer.Scorer` that decide whether a prompt fits."""

    @property
    def n_embd(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: int
    spec: PromptSpec
    task_name: str
    labels: tuple[str, ...]
    template: Template
    model_fingerprint: str
    model_name: str
    architecture: str
    history: tuple[dict[str, Any], ...]
    others: tuple[Template, ...] = ()
    task: Task | None = None
    layers: tuple[NaturalInt, ...] | UnsetType = UNSET  # left out of format 2, whose readers refuse unknown fields
    layer_templates: tuple[Template, ...] | UnsetType = UNSET


class Prompt:
    """A soft prompt for one model and one task.

    Args:
        rows: float32 [n_prompt, n_embd].
        spec: how the prompt was made and, in ``spec.placement``, where it goes.
        task_name: name of the task it was tuned for.
        labels: label names in the order of the template's label words.
        template: how a text is presented to the model.
        model_fingerprint: ``sha256:…`` of the model file.
        model_name: display name of the model.
        architecture: the model's architecture.
        history: small JSON objects, one per step, for example a run or an import.
        label_bias: [n_labels] added to the label words' logits; None: zeros.
        word_ids: token ids [n_words] whose logits a readout uses (`fedbpt.objective.readout`); None: no readout.
        word_weights: [n_words, n_labels], weights of these logits for each label; requires ``word_ids``.
        others: templates whose corrected log-probabilities, without a prompt, are averaged with the prompt's.
        other_weights: [n_others, 1 + n_words, n_labels], the readouts of ``others``; requires ``others``.
        layer_readout: how label logits are read from hidden states, instead of from words; requires that
            ``label_bias``, ``word_ids`` and ``others`` are left out. None: they are not.
        task: the full task (templates, columns, length limits); None: the built-in one of that name and those labels,
            or unknown.

    Raises:
        InputError: inconsistent shapes, NaN or infinity, a history that JSON cannot represent, a task with another
            name or other labels.
    """

    @checked
    def __init__(
        self,
        *,
        rows: NDArray[np.floating[Any]],
        spec: PromptSpec,
        task_name: str,
        labels: tuple[str, ...],
        template: Template,
        model_fingerprint: str,
        model_name: str,
        architecture: str,
        history: tuple[Mapping[str, Any], ...] = (),
        label_bias: NDArray[np.floating[Any]] | None = None,
        word_ids: NDArray[np.integer[Any]] | None = None,
        word_weights: NDArray[np.floating[Any]] | None = None,
        others: tuple[Template, ...] = (),
        other_weights: NDArray[np.floating[Any]] | None = None,
        layer_readout: LayerReadout | None = None,
        task: Task | None = None,
    ) -> None:
        self.rows = array_of(rows, np.float32, "rows")
        bias = np.zeros(len(labels)) if label_bias is None else label_bias
        self.label_bias = array_of(bias, np.float32, "label_bias")
        self.word_ids = array_of([] if word_ids is None else word_ids, np.int32, "word_ids")
        if word_weights is None:
            word_weights = np.zeros((0, len(labels)))
        self.word_weights = array_of(word_weights, np.float32, "word_weights")
        self.others = tuple(others)
        if other_weights is None:
            other_weights = np.zeros((0, 1 + self.word_ids.size, len(labels)))
        self.other_weights = array_of(other_weights, np.float32, "other_weights")
        self.layer_readout = None if layer_readout is None else _as_stored(layer_readout)
        self.spec = spec
        self.task_name = task_name
        self.labels = tuple(labels)
        self.template = template
        self.model_fingerprint = model_fingerprint
        self.model_name = model_name
        self.architecture = architecture
        self.history = tuple(dict(entry) for entry in history)
        self.task = _built_in(task_name, self.labels) if task is None else task
        self._check()

    def _check(self) -> None:
        n_labels = len(self.labels)
        if self.task is not None and (self.task.name, self.task.labels) != (self.task_name, self.labels):
            raise InputError(
                f"task must be {self.task_name} with labels {list(self.labels)}, got {self.task.name} with "
                f"{list(self.task.labels)}",
                field="task",
            )
        if self.rows.ndim != 2 or self.rows.shape[0] != self.spec.n_prompt or self.rows.shape[1] == 0:
            raise InputError(
                f"rows must have shape [{self.spec.n_prompt}, n_embd], got {list(self.rows.shape)}", field="rows"
            )
        if self.label_bias.shape != (n_labels,):
            raise InputError(
                f"label_bias must have shape [{n_labels}], got {list(self.label_bias.shape)}", field="label_bias"
            )
        if self.word_ids.ndim != 1 or self.word_weights.shape != (self.n_words, n_labels):
            raise InputError(
                f"word_weights must have shape {[self.n_words, n_labels]}, one row for each of word_ids, "
                f"got {list(self.word_weights.shape)}",
                field="word_weights",
            )
        expected = (len(self.others), 1 + self.n_words, n_labels)
        if self.other_weights.shape != expected:
            raise InputError(
                f"other_weights must have shape {list(expected)}, got {list(self.other_weights.shape)}",
                field="other_weights",
            )
        if self.layer_readout is not None:
            _check_layer_readout(self.layer_readout, self.n_embd, n_labels)
            if self.label_bias.any() or self.n_words or self.others:
                raise InputError(
                    "a layer readout has its own bias and templates: leave out label_bias, word_ids and others",
                    field="layer_readout",
                )
        layer_templates = () if self.layer_readout is None else self.layer_readout.others
        for used in (self.template, *self.others, *layer_templates):
            if len(used.label_words) != n_labels:
                raise InputError(
                    f"a template must have {n_labels} label words, one for each label, got {len(used.label_words)}",
                    field="label_words",
                )
        for name in ("rows", "label_bias", "word_weights", "other_weights"):
            if not np.isfinite(getattr(self, name)).all():
                raise InputError(f"{name} must be finite, got NaN or infinity", field=name)
        try:
            json.dumps(self.history, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"history must be plain JSON values: {error}", field="history") from error

    @property
    def n_prompt(self) -> int:
        return int(self.rows.shape[0])

    @property
    def n_embd(self) -> int:
        return int(self.rows.shape[1])

    @property
    def n_words(self) -> int:
        """Number of words that the readout uses; 0: no readout."""
        return int(self.word_ids.size)

    @property
    def readout(self) -> Readout:
        """Label bias and word weights of all templates, for an `Objective` with this prompt's ``word_ids``."""
        own = Array.of(np.concatenate([self.label_bias[None], self.word_weights]), "<f4")
        return Readout(weights=own, others=tuple(Array.of(of_template, "<f4") for of_template in self.other_weights))

    @checked
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file and, next to it, its model card (`card_path`); an existing file is replaced atomically.

        Raises:
            PromptError: a file cannot be written.
        """
        target = Path(path)
        card = model_card(self, use_in_fedbpt(self, target.name))
        write({target: self.to_bytes(), card_path(target): encode_card(card)})
        return target

    def to_bytes(self) -> bytes:
        """Encode as the content of a prompt file."""
        layered = self.layer_readout
        header = _Header(
            format=SHIFTS_FORMAT if self.spec.shifts else FORMAT if layered is None else LAYERS_FORMAT,
            spec=self.spec,
            task_name=self.task_name,
            labels=self.labels,
            template=self.template,
            model_fingerprint=self.model_fingerprint,
            model_name=self.model_name,
            architecture=self.architecture,
            history=self.history,
            others=self.others,
            task=self.task,
            layers=UNSET if layered is None else layered.layers,
            layer_templates=UNSET if layered is None else layered.others,
        )
        tensors: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _TENSORS}
        if layered is not None:
            tensors |= layer_tensors(layered)
        elif len(self.word_ids) or self.others:
            names = _OTHERS_TENSORS if self.others else _READOUT_TENSORS
            tensors |= {name: getattr(self, name) for name in names}
        return safetensors.numpy.save(tensors, metadata={_KEY: msgspec.json.encode(header).decode()})

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> Prompt:
        """Read a file that `save` wrote. Raises `PromptError` if it is missing, damaged, no prompt, or newer."""
        source = Path(path)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise PromptError(f"cannot read the prompt {source}: {error.strerror or error}", field="path") from error
        return cls.decode(content, str(source))

    @classmethod
    @checked
    def decode(cls, content: bytes, source: str) -> Prompt:
        """Decode a prompt file's content; ``source``: its name in error messages. Raises `PromptError` as `load`."""
        try:
            tensors = safetensors.numpy.load(content)
            metadata = _metadata(content)
        except (safetensors.SafetensorError, *DECODE_ERRORS, KeyError) as error:
            raise PromptError(
                f"{source} is not a complete safetensors file: copy or export the prompt again"
            ) from error
        header = _header(metadata[_KEY], source) if _KEY in metadata else None  # names a format that it cannot read
        if header is None or set(tensors) not in _TENSOR_SETS:
            raise PromptError(f"{source} is a safetensors file, but not a prompt: use one that fedbpt saved")
        layers, templates = header.layers, header.layer_templates
        names = [name for name in header.__struct_fields__ if name not in ("format", *_LAYERS_FIELDS)]
        fields: dict[str, Any] = {name: getattr(header, name) for name in names}
        if ("layer_weights" in tensors) != (layers is not UNSET and templates is not UNSET):
            raise PromptError(
                f"{source} is damaged: it must have layer_weights with layers and layer_templates, or none of them"
            )
        try:
            if layers is not UNSET and templates is not UNSET:
                fields["layer_readout"] = LayerReadout(
                    layers=layers,
                    weights=Array.of(tensors.pop("layer_weights"), "<f4"),
                    word_scales=Array.of(tensors.pop("word_scales"), "<f4"),
                    bias=Array.of(tensors.pop("label_bias"), "<f4"),
                    others=templates,
                )
            return cls(**{**tensors, **fields})
        except InputError as error:
            raise PromptError(f"{source} is damaged: {error}", field=error.field) from error

    @checked
    def with_rows(self, rows: NDArray[np.floating[Any]], history: tuple[Mapping[str, Any], ...]) -> Prompt:
        """Copy with other rows [n_prompt, n_embd] and another history."""
        tensors = {name: getattr(self, name) for name in (_TENSORS | _OTHERS_TENSORS) - {"rows"}}
        fields = {name: getattr(self, name) for name in _METADATA_FIELDS if name != "history"}
        return Prompt(rows=rows, history=history, layer_readout=self.layer_readout, **tensors, **fields)

    @checked
    def check(self, model: Model) -> None:
        """Raise `PromptError`, naming both models, if the prompt was made for another model."""
        if model.fingerprint != self.model_fingerprint:
            raise PromptError(
                f"this prompt was made for {self.model_name} ({short_fingerprint(self.model_fingerprint)}), "
                f"not for {model.name} ({short_fingerprint(model.fingerprint)}): "
                f"load {self.model_name}, or tune a prompt for {model.name}",
                field="model_fingerprint",
            )
        if model.n_embd != self.n_embd:
            raise PromptError(
                f"this prompt's rows must have {model.name}'s n_embd of {model.n_embd} numbers, got {self.n_embd}",
                field="rows",
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prompt):
            return NotImplemented
        tensors_equal = all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in _TENSORS | _OTHERS_TENSORS
        )
        if not tensors_equal or self.layer_readout != other.layer_readout:
            return False
        return all(getattr(self, name) == getattr(other, name) for name in _METADATA_FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def _readout_line(self) -> str:
        if self.layer_readout is None:
            return f"{self.n_words} words, {1 + len(self.others)} template(s)"
        layers = ", ".join(map(str, self.layer_readout.layers))
        return f"layers {layers}, {1 + len(self.layer_readout.others)} template(s)"

    def _repr_html_(self) -> str:
        words = zip(self.labels, self.template.label_words, strict=True)
        lines = [
            ("model", f"{self.model_name} ({short_fingerprint(self.model_fingerprint)})"),
            ("prompt", f"{self.n_prompt} x {self.n_embd}, {self.spec.placement}"),
            ("template", repr(self.template.pattern)),
            ("labels", ", ".join(f"{label} →{word}" for label, word in words)),
            ("readout", self._readout_line()),
        ]
        return html_table(f"Prompt for {self.task_name}", [line for line in lines if line[1]])

    def __repr__(self) -> str:
        norm = float(np.linalg.norm(self.rows)) / math.sqrt(self.n_prompt)
        return (
            f"Prompt({self.task_name!r} for {self.model_name!r}, {self.n_prompt} x {self.n_embd} {self.spec.placement},"
            f" labels={list(self.labels)}, row norm {norm:.3g}, {len(self.history)} history entries)"
        )


def layer_tensors(readout: LayerReadout) -> dict[str, NDArray[Any]]:
    """The tensors of a layer readout as a prompt file has them, by name."""
    return {
        "layer_weights": readout.weights.numpy().astype(np.float16),
        "word_scales": readout.word_scales.numpy().astype(np.float32),
        "label_bias": readout.bias.numpy().astype(np.float32),
    }


def _as_stored(readout: LayerReadout) -> LayerReadout:
    """``readout`` in the number formats of a prompt file. Raises `InputError` for NaN or infinity."""
    found = {}
    for name, array, dtype in (
        ("layer_weights", readout.weights, "<f2"),
        ("word_scales", readout.word_scales, "<f4"),
        ("label_bias", readout.bias, "<f4"),
    ):
        try:
            with np.errstate(over="ignore"):
                stored = Array.of(array.numpy(), cast(Dtype, dtype))
            stored.numpy()
        except WireError as error:
            raise InputError(f"{name} must be finite in {dtype}: {error}", field=name) from error
        found[name] = stored
    return msgspec.structs.replace(
        readout, weights=found["layer_weights"], word_scales=found["word_scales"], bias=found["label_bias"]
    )


def _check_layer_readout(readout: LayerReadout, n_embd: int, n_labels: int) -> None:
    n_templates = 1 + len(readout.others)
    if not readout.layers or list(readout.layers) != sorted({*readout.layers}) or readout.layers[0] < 0:
        raise InputError(f"layers must ascend from 0 or more, got {list(readout.layers)}", field="layers")
    expected = (n_templates, len(readout.layers), n_embd, n_labels)
    shapes = {
        "layer_weights": (readout.weights.shape, expected),
        "word_scales": (readout.word_scales.shape, (n_templates,)),
        "label_bias": (readout.bias.shape, (n_labels,)),
    }
    for name, (got, wanted) in shapes.items():
        if got != wanted:
            raise InputError(f"{name} must have shape {list(wanted)}, got {list(got)}", field=name)


def card_path(prompt_path: Path) -> Path:
    """Path of a prompt file's model card: the file name with ``.md`` appended."""
    return prompt_path.parent / f"{prompt_path.name}.md"


def encode_card(card: str) -> bytes:
    """Encode a model card as UTF-8, escaping file names that are not valid Unicode."""
    return card.encode(errors="backslashreplace")


def write(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together. Raises `PromptError` if one cannot be written; then none is replaced."""
    try:
        write_whole(files)
    except OSError as error:
        reason = error.strerror or error
        raise PromptError(f"cannot write the prompt to {error.filename}: {reason}", field="path") from error


def _metadata(content: bytes) -> dict[str, str]:
    """Metadata of a safetensors file: 8 bytes of length, then JSON with an entry ``__metadata__``."""
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return dict(found)


def _header(text: str, source: str) -> _Header:
    try:
        number = json.loads(text)["format"]
        if number not in _READABLE_FORMATS:
            raise PromptError(
                f"{source} has prompt format {number}, but this fedbpt reads formats up to {SHIFTS_FORMAT}: "
                "update fedbpt",
                field="format",
                limit=SHIFTS_FORMAT,
            )
        return from_json(text, _Header)
    except (*DECODE_ERRORS, KeyError, TypeError) as error:
        raise PromptError(f"{source} is damaged: {error}") from error


def _built_in(name: str, labels: tuple[str, ...]) -> Task | None:
    found = BUILTIN.get(name)
    return found if found is not None and found.labels == labels else None


def short_fingerprint(fingerprint: str) -> str:
    """Shorten a fingerprint for messages."""
    return fingerprint[:19] + "…" if len(fingerprint) > 20 else fingerprint
