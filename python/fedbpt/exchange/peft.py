"""Prompts as adapters of Hugging Face PEFT's prompt tuning (Lester et al. 2021, arXiv 2104.08691).

PEFT puts an adapter's virtual tokens before everything, including BOS. A prompt between BOS and the text (``front``)
gets the embedding of BOS as its first virtual token, so that PEFT's model computes the same from token ids without BOS.
A prompt in the answer cue does not fit PEFT's forward pass: the README's code places its rows there.

A folder holds PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, the whole prompt as
``prompt.safetensors``, and ``README.md``, a model card with code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fedbpt.checking import DECODE_ERRORS
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ConfigError, PromptError
from fedbpt.exchange.snippet import snippet
from fedbpt.machine.files import PARTIAL
from fedbpt.prompts.model_card import fenced, known_model, model_card
from fedbpt.prompts.prompt import Prompt, encode_card, write
from fedbpt.protocol.specs import PromptSpec
from fedbpt.tasks.task import Task, bos_ids

CHECKED = ("gemma3", "llama", "qwen2")
"""Architectures for which tests compare the logits with those of transformers."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PROMPT = "prompt.safetensors"
_KEY = "prompt_embeddings"


def write_adapter(prompt: Prompt, folder: Path, scorer: Scorer, task: Task, base_model: str | None) -> Path:
    """Write an adapter. Arguments and errors as for `fedbpt.exchange.export_prompt`."""
    prompt.check(scorer)
    _check_architecture(scorer)
    if prompt.spec.shifts:
        raise PromptError(
            "this prompt is added to layers' outputs, and PEFT's prompt tuning has virtual tokens only: export it as "
            "gguf or npy, or tune with placement = 'cue'",
            field="placement",
        )
    if task.labels != prompt.labels:
        problem = f"the task has labels {list(task.labels)}, the prompt {list(prompt.labels)}"
        raise ConfigError(f"{problem}: give the prompt's task", field="task")
    known = known_model(prompt.model_name, prompt.model_fingerprint)
    base = base_model or (known.original if known else None)
    if base is None:
        raise ConfigError(
            f"{prompt.model_name} is not in the catalogue: give its weights' Hugging Face name or folder with --base",
            field="base_model",
        )
    bos = _bos_rows(prompt.spec, scorer)
    code = snippet(prompt, scorer, task, base, len(bos))
    use = "".join(f"{note}\n\n" for note in notes(prompt, scorer))
    use += f"```console\n$ pip install torch transformers peft\n```\n\n{fenced(code, 'python')}"
    rows = np.concatenate([bos, prompt.rows])
    _create(folder)
    files = {
        _CONFIG: json.dumps(
            _config(rows, base), indent=2
        ).encode(),  # first: it identifies the folder to the next export
        _PROMPT: prompt.to_bytes(),
        _WEIGHTS: safetensors.numpy.save({_KEY: rows}, metadata={"format": "pt"}),
        "README.md": encode_card(model_card(prompt, use, "peft")),
    }
    write({folder / name: content for name, content in files.items()})
    return folder


def notes(prompt: Prompt, scorer: Scorer) -> tuple[str, ...]:
    """What a user of the adapter must know, one line each."""
    found = []
    n_bos = len(_bos_rows(prompt.spec, scorer))
    if prompt.spec.placement == "cue":
        found.append(
            f"The prompt replaces the last {prompt.n_prompt} token(s) of the answer cue, but PEFT puts virtual tokens "
            "first: use README.md's code, not PEFT's generate()."
        )
    elif n_bos:
        found.append("The first virtual token is BOS: use token ids without it (add_special_tokens=False).")
    if prompt.label_bias.any() or prompt.n_words or prompt.others or prompt.layer_readout is not None:
        found.append(
            "An adapter has no label bias and no readout: README.md's code reads them from prompt.safetensors."
        )
    return tuple(found)


def read_adapter(folder: Path, scorer: Scorer, task: Task | None, template: int) -> Prompt:
    """Read an adapter. Arguments and errors as for `fedbpt.exchange.import_prompt`."""
    config, rows = _read(folder)
    _check_architecture(scorer)
    if rows.shape[1] != scorer.n_embd:
        raise PromptError(
            f"{folder} has virtual tokens of {rows.shape[1]} numbers, {scorer.name} embeddings of {scorer.n_embd}: "
            f"give the model that the adapter was trained for{_base_name(config)}"
        )
    if (folder / _PROMPT).is_file():
        return _continued(Prompt.load(folder / _PROMPT), rows, folder, scorer, task)
    if task is None:
        raise ConfigError(f"{folder} was not written by fedbpt: give its task (--task)", field="task")
    if not 0 <= template < len(task.templates):
        raise ConfigError(
            f"template must be 0 to {len(task.templates) - 1} for task {task.name}, got {template}",
            field="template",
            limit=len(task.templates) - 1,
        )
    origin = {"peft_version": config.get("peft_version"), "base_model": config.get("base_model_name_or_path")}
    return Prompt(
        rows=rows,
        spec=PromptSpec(placement="first", n_prompt=len(rows), d=1),
        task_name=task.name,
        labels=task.labels,
        template=task.templates[template],
        model_fingerprint=scorer.fingerprint,
        model_name=scorer.name,
        architecture=scorer.architecture,
        history=({"imported_from": "PEFT", **{name: value for name, value in origin.items() if value}},),
        task=task,
    )


def _continued(prompt: Prompt, rows: NDArray[np.float32], folder: Path, scorer: Scorer, task: Task | None) -> Prompt:
    """The prompt that was exported to ``folder``, with the adapter's current rows."""
    prompt.check(scorer)
    if task is not None and task.labels != prompt.labels:
        problem = f"the task has labels {list(task.labels)}, the adapter {list(prompt.labels)}"
        raise ConfigError(f"{problem}: give the adapter's task, or none", field="task")
    bos = _bos_rows(prompt.spec, scorer)
    own = rows[len(bos) :]
    if own.shape != prompt.rows.shape:
        raise PromptError(
            f"{folder} has {len(rows)} virtual tokens, expected {len(bos) + prompt.n_prompt} by its {_PROMPT}"
        )
    if not np.array_equal(rows[: len(bos)], bos):
        raise PromptError(
            f"the first virtual token in {folder} must be BOS, but was trained: train it again with that token frozen"
        )
    if np.array_equal(own, prompt.rows):
        return prompt
    return prompt.with_rows(own, ({"imported_from": "PEFT, trained further"},))


def _bos_rows(spec: PromptSpec, scorer: Scorer) -> NDArray[np.float32]:
    """Embeddings [n, n_embd] of the tokens before the prompt: for ``front``, BOS, if the model was trained with it."""
    ids = bos_ids(scorer)
    return scorer.token_embeddings(ids if spec.placement == "front" else ids[:0])


def _check_architecture(scorer: Scorer) -> None:
    if scorer.architecture not in CHECKED:
        raise PromptError(
            f"PEFT adapters are only supported for architectures {', '.join(CHECKED)}, {scorer.name} has "
            f"{scorer.architecture}: export to gguf or npy"
        )


def _config(rows: NDArray[np.float32], base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def _create(folder: Path) -> None:
    """Create the folder. Raises `PromptError` if it has other content, which must not be overwritten."""
    try:
        # ignoring temporary files of a killed export
        has_others = folder.exists() and any(path.suffix != PARTIAL for path in folder.iterdir())
        if has_others and not (folder / _CONFIG).is_file():
            raise PromptError(f"{folder} is not empty and has no adapter: choose a new folder", field="out")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PromptError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Read an adapter's configuration, and its virtual tokens' embeddings [n, n_embd]."""
    if not (folder / _CONFIG).is_file():
        raise PromptError(f"{folder} has no {_CONFIG}: give the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        peft_type = config["peft_type"]
        task_type = config.get("task_type")
        n_submodules = config.get("num_transformer_submodules")
    except (OSError, *DECODE_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{folder / _CONFIG} is damaged: {error}") from error
    if peft_type != "PROMPT_TUNING" or task_type not in ("CAUSAL_LM", None) or n_submodules == 2:
        raise PromptError(
            f"{folder} is a {peft_type} adapter for {task_type}: only PROMPT_TUNING for CAUSAL_LM can be imported"
        )
    if not (folder / _WEIGHTS).is_file():
        raise PromptError(f"{folder} has no {_WEIGHTS}: save it again with PEFT, as pickled files are not read")
    try:
        content = (folder / _WEIGHTS).read_bytes()
        tensors = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
        found = tensors[_KEY]
        rows = _floats(found["dtype"], found["data"]).reshape(found["shape"])
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise PromptError(f"cannot read {_KEY} from {folder / _WEIGHTS}: {error}", field=_KEY) from error
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise PromptError(
            f"{folder / _WEIGHTS}: {_KEY} must be finite numbers [n, n_embd], got shape {list(rows.shape)}", field=_KEY
        )
    return config, rows


def _floats(dtype: str, data: bytes) -> NDArray[np.float32]:
    """Decode a tensor's little-endian bytes to float32 [n]. bfloat16 is the upper half of float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _base_name(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return f", {base}" if base else ""
