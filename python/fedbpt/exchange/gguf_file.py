"""Prompts as GGUF files: tensors and metadata for any program with a GGUF reader.

The metadata follow those of LoRA adapters: ``general.type`` adapter, ``general.architecture`` the model's,
``adapter.type`` soft_prompt. ``soft_prompt.weight`` holds the rows in order, float32, as ``llama_batch.embd`` expects
them. The other tensors are those of a prompt file (`fedbpt.prompts.prompt`), without empty ones.
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


def write_gguf(prompt: Prompt, target: Path) -> Path:
    """Write a prompt as one GGUF file, with a model card.

    Raises:
        MissingExtraError: the package gguf is not installed.
        PromptError: the file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("an export to GGUF", "gguf") from error
    partial = target.parent / f".{target.name}.part"
    use = _USE.format(name=target.name, n_prompt=prompt.n_prompt, n_embd=prompt.n_embd)
    writer = gguf.GGUFWriter(partial, prompt.architecture)
    try:
        _add_metadata(writer, prompt)
        writer.add_tensor(ROWS, prompt.rows)
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
    """The tensors besides the rows, by name."""
    if prompt.layer_readout is not None:
        return layer_tensors(prompt.layer_readout)
    found = {name: getattr(prompt, name) for name in _TENSORS}
    return {name: values for name, values in found.items() if values.size}


def _add_metadata(writer: Any, prompt: Prompt) -> None:
    writer.add_type("adapter")
    writer.add_name(f"{prompt.task_name} for {prompt.model_name}")
    writer.add_string("adapter.type", "soft_prompt")
    writer.add_string("fedbpt.placement", prompt.spec.placement)
    writer.add_string("fedbpt.task", prompt.task_name)
    writer.add_string("fedbpt.model.name", prompt.model_name)
    writer.add_string("fedbpt.model.fingerprint", prompt.model_fingerprint)
    if prompt.task is not None:
        writer.add_string("fedbpt.task.definition", msgspec.json.encode(prompt.task).decode())
    templates = (prompt.template, *prompt.others)
    if prompt.layer_readout is not None:
        templates = (prompt.template, *prompt.layer_readout.others)
        writer.add_array("fedbpt.layers", list(prompt.layer_readout.layers))
    writer.add_array("fedbpt.templates", [template.pattern for template in templates])
    if prompt.labels:
        writer.add_array("fedbpt.labels", list(prompt.labels))
        writer.add_array("fedbpt.label_words", [word for template in templates for word in template.label_words])
