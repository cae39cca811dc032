"""Prompts as GGUF files: tensors and metadata for any program with a GGUF reader.

The metadata follow those of LoRA adapters: ``general.type`` adapter, ``general.architecture`` the model's,
``adapter.type`` soft_prompt. ``soft_prompt.weight`` holds the rows in order, float32, as ``llama_batch.embd`` expects
them. The other tensors are those of a prompt file (`fedbpt.prompts.prompt`), without empty ones.

A prompt that shifts layers becomes a control vector of llama.cpp (``llama-cli --control-vector FILE``): its rows
alone, as ``direction.N`` for the output of layer N, from 1. llama.cpp adds it at every token, not from the cue on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import MissingExtraError, PromptError
from fedbpt.prompts.model_card import model_card
from fedbpt.prompts.prompt import Prompt, card_path, encode_card, layer_tensors, write

ROWS = "soft_prompt.weight"
_TENSORS = ("label_bias", "word_ids", "word_weights", "other_weights")

_USE = """\
`{name}` is a GGUF file of tensors and metadata, which `gguf-dump {name}` lists. `soft_prompt.weight` holds the rows,
input embeddings in float32. llama.cpp's programs cannot read it; your own program can pass the rows to `llama_decode`
as `llama_batch.embd`, at the position given by `fedbpt.placement`.

```python
import gguf

tensors = {{tensor.name: tensor.data for tensor in gguf.GGUFReader("{name}").tensors}}
rows = tensors["soft_prompt.weight"]  # float32 [{n_prompt}, {n_embd}]
```
"""


_USE_CONTROL_VECTOR = """\
`{name}` is a control vector of llama.cpp: `llama-cli --control-vector {name}` adds `direction.N` to the output of layer
N at **every** token. The prompt was tuned to be added from the cue's last token on, so answers differ from those in
fedbpt. What the file lacks: {lacks}. The prompt file has it all.
"""

_FIRST_DIRECTION = 1  # llama.cpp has none for the output of layer 0


def notes(prompt: Prompt) -> tuple[str, ...]:
    """What an export to GGUF loses, one line each."""
    if not prompt.spec.shifts:
        return ()
    return (
        "a control vector acts at every token, a prompt from the cue's last one on: other text suffers",
        f"the control vector lacks {_lacks(prompt)}: fedbpt needs the prompt file",
    )


def _lacks(prompt: Prompt) -> str:
    lost = ["the template"]
    if prompt.labels:
        lost.append("how labels are read")
    if directions(prompt).keys() != {f"direction.{layer}" for layer in layers_shifted(prompt)}:
        lost.append("the shift of layer 0, which llama.cpp does not have")
    return ", ".join(lost)


def layers_shifted(prompt: Prompt) -> tuple[int, ...]:
    """The layers to whose output rows are added, in the order of rows."""
    shift = prompt.spec.shift
    return () if isinstance(shift, msgspec.UnsetType) else shift.layers


def directions(prompt: Prompt) -> dict[str, NDArray[np.float32]]:
    """Tensors [n_embd] of the control vector, by name."""
    rows = zip(layers_shifted(prompt), prompt.rows, strict=True)
    return {f"direction.{layer}": row for layer, row in rows if layer >= _FIRST_DIRECTION}


def write_gguf(prompt: Prompt, target: Path) -> Path:
    """Write a prompt as one GGUF file, with a model card.

    Raises:
        MissingExtraError: the package gguf is not installed.
        PromptError: the file cannot be written; the prompt shifts layer 0 alone, which a control vector cannot.
    """
    if prompt.spec.shifts and not directions(prompt):
        raise PromptError("a control vector cannot shift layer 0, the only one of this prompt: export it to npy")
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("an export to GGUF", "gguf") from error
    partial = target.parent / f".{target.name}.part"
    if prompt.spec.shifts:
        use = _USE_CONTROL_VECTOR.format(name=target.name, lacks=_lacks(prompt))
    else:
        use = _USE.format(name=target.name, n_prompt=prompt.n_prompt, n_embd=prompt.n_embd)
    writer = gguf.GGUFWriter(partial, "controlvector" if prompt.spec.shifts else prompt.architecture)
    try:
        _add_metadata(writer, prompt)
        for name, values in _tensors(prompt).items():
            writer.add_tensor(name, np.ascontiguousarray(values))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = partial.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot write the prompt to {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # the first error is the one to raise
            partial.unlink()
    write({target: content, card_path(target): encode_card(model_card(prompt, use, "gguf"))})
    return target


def _tensors(prompt: Prompt) -> dict[str, NDArray[Any]]:
    """The tensors by name: the rows and those of the readout, or a control vector's."""
    if prompt.spec.shifts:
        return dict(directions(prompt))
    if prompt.layer_readout is not None:
        return {ROWS: prompt.rows, **layer_tensors(prompt.layer_readout)}
    found = {name: getattr(prompt, name) for name in _TENSORS}
    return {ROWS: prompt.rows, **{name: values for name, values in found.items() if values.size}}


def _add_metadata(writer: Any, prompt: Prompt) -> None:
    writer.add_type("adapter")
    writer.add_name(f"{prompt.task_name} for {prompt.model_name}")
    if prompt.spec.shifts:
        writer.add_string("controlvector.model_hint", prompt.architecture)
        writer.add_uint32("controlvector.layer_count", len(directions(prompt)))
    else:
        writer.add_string("adapter.type", "soft_prompt")
    writer.add_string("fedbpt.placement", prompt.spec.placement)
    writer.add_string("fedbpt.task", prompt.task_name)
    writer.add_string("fedbpt.model.name", prompt.model_name)
    writer.add_string("fedbpt.model.fingerprint", prompt.model_fingerprint)
    if prompt.task is not None:
        writer.add_string("fedbpt.task.definition", msgspec.json.encode(prompt.task).decode())
    templates = (prompt.template, *prompt.others)
    if prompt.layer_readout is not None and not prompt.spec.shifts:
        templates = (prompt.template, *prompt.layer_readout.others)
        writer.add_array("fedbpt.layers", list(prompt.layer_readout.layers))
    writer.add_array("fedbpt.templates", [template.pattern for template in templates])
    if prompt.labels:
        writer.add_array("fedbpt.labels", list(prompt.labels))
        writer.add_array("fedbpt.label_words", [word for template in templates for word in template.label_words])
