"""Prompts in the formats of other programs: Hugging Face PEFT adapters, GGUF and NumPy files.

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
    """What `export_prompt` wrote: ``path``, a file or a folder; ``notes``, one line each, on what it does not hold."""

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
    """Write a prompt for another program, with a model card beside it.

    Args:
        prompt: what to write.
        out: ``peft``: the adapter's folder, new or empty or with an adapter; ``gguf``, ``npy``: the file.
        to: ``peft``: a prompt-tuning adapter, its virtual tokens the prompt's rows, and a README.md with code that
            gives the same label logits; ``gguf``: all of the prompt, as tensors and metadata; ``npy``: its rows,
            float32 [n_prompt, n_embd].
        scorer: the prompt's model; needed for ``peft``, whose code holds token ids.
        task: how texts are cut, for ``peft``; None: as the prompt's own task says.
        base_model: of the model's weights, the Hugging Face name or folder, for ``peft``; None: as the catalogue says.

    Raises:
        PromptError: ``out`` cannot be written; for ``peft``, the prompt is another model's, or its architecture was not
            compared with PEFT's.
        ConfigError: what ``peft`` needs is not given; another task.
        MissingExtraError: ``gguf`` without the package of that name.
    """
    target = Path(out)
    if to == "gguf":
        return Exported(gguf_file.write_gguf(prompt, target), scale_notes(prompt.architecture))
    if to == "npy":
        return Exported(npy.write_npy(prompt, target), (*npy.notes(prompt), *scale_notes(prompt.architecture)))
    chosen = prompt.task if task is None else load(task)
    if scorer is None or chosen is None:
        raise ConfigError("an export to PEFT needs the model, and the task where the prompt has none: give both")
    return Exported(peft.write_adapter(prompt, target, scorer, chosen, base_model), peft.notes(prompt, scorer))


@checked
def import_prompt(
    folder: str | os.PathLike[str], scorer: Scorer, task: GivenTask | None = None, template: int = 0
) -> Prompt:
    """A PEFT prompt-tuning adapter as a prompt.

    Rows are taken bit for bit. An adapter that `export_prompt` wrote gives the prompt that it was; where PEFT has
    trained it further, with the new rows and without its history. Another adapter's rows stand before everything, BOS
    included, as PEFT puts them.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        scorer: the model that the adapter was trained for.
        task: how texts are put to it; None: as the prompt was tuned, for an adapter that fedbpt wrote.
        template: which of the task's templates, for an adapter that fedbpt did not write.

    Raises:
        PromptError: no such adapter, another kind of adapter, or one for another model.
        ConfigError: another task, or none for an adapter that fedbpt did not write; no such template.
    """
    return peft.read_adapter(Path(folder), scorer, None if task is None else load(task), template)
