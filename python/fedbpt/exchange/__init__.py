"""Export and import of prompts: Hugging Face PEFT adapters, GGUF files, NumPy files.

>>> from fedbpt.exchange import export_prompt, import_prompt
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from fedbpt.argument_types import checked
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ConfigError
from fedbpt.exchange import gguf_file, npy, peft
from fedbpt.prompts.model_card import scale_notes
from fedbpt.prompts.prompt import Prompt
from fedbpt.tasks import GivenTask, load

__all__ = ["TARGETS", "Exported", "Target", "export_prompt", "import_prompt"]

Target: TypeAlias = Literal["peft", "gguf", "npy"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class Exported:
    """The result of `export_prompt`. ``path``: a file or folder; ``notes``: its limitations, one line each."""

    path: Path
    notes: tuple[str, ...]


@checked
def export_prompt(
    prompt: Prompt,
    out: str | os.PathLike[str],
    to: Target,
    *,
    scorer: Scorer | None = None,
    task: GivenTask | None = None,
    base_model: str | None = None,
) -> Exported:
    """Write a prompt in the format of another program, with a model card.

    Args:
        prompt: the prompt to write.
        out: for ``peft``, the adapter's folder, which must be new, empty or hold an adapter; for ``gguf`` and ``npy``,
            the file.
        to: ``peft``: a prompt-tuning adapter with the prompt's rows as virtual tokens, and a README.md with code that
            computes the same label logits; ``gguf``: the whole prompt, as tensors and metadata, or if it
            shifts layers, its rows as a control vector of llama.cpp; ``npy``: the rows,
            float32 [n_prompt, n_embd].
        scorer: the prompt's model; required for ``peft``, whose code contains token ids.
        task: for ``peft``, the task by which texts are cut; None: the prompt's own.
        base_model: for ``peft``, the Hugging Face name or the folder of the model's weights; None: from the catalogue.

    Raises:
        PromptError: ``out`` cannot be written; for ``peft``, the prompt is for another model, or the architecture is
            not tested with PEFT.
        ConfigError: an argument that ``peft`` requires is missing, or the task has other labels.
        MissingExtraError: ``gguf`` without the package of that name.
    """
    target = Path(out)
    if to == "gguf":
        written = gguf_file.write_gguf(prompt, target)
        lost = gguf_file.notes(prompt) or scale_notes(prompt.architecture)  # states have no scale of embeddings
        return Exported(written, lost)
    if to == "npy":
        return Exported(npy.write_npy(prompt, target), (*npy.notes(prompt), *scale_notes(prompt.architecture)))
    chosen = prompt.task if task is None else load(task)
    if scorer is None or chosen is None:
        missing = "scorer" if scorer is None else "task"
        raise ConfigError(
            "an export to PEFT needs the model, and the task if the prompt has none: give both", field=missing
        )
    return Exported(peft.write_adapter(prompt, target, scorer, chosen, base_model), peft.notes(prompt, scorer))


@checked
def import_prompt(
    folder: str | os.PathLike[str], scorer: Scorer, task: GivenTask | None = None, template: int = 0
) -> Prompt:
    """Read a PEFT prompt-tuning adapter as a prompt.

    Rows are kept bit for bit. An adapter written by `export_prompt` gives the original prompt; if PEFT trained it
    further, with the new rows and without its history. The rows of any other adapter are placed before everything,
    including BOS, as in PEFT.

    Args:
        folder: folder with adapter_config.json and adapter_model.safetensors.
        scorer: the model that the adapter was trained for.
        task: the task; None: the prompt's own, for an adapter written by fedbpt.
        template: number of the task's template, for an adapter not written by fedbpt.

    Raises:
        PromptError: no such adapter, another type of adapter, or one for another model.
        ConfigError: a task with other labels, no task for an adapter not written by fedbpt, or no such template.
    """
    return peft.read_adapter(Path(folder), scorer, None if task is None else load(task), template)
