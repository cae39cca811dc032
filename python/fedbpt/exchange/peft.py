"""Prompts as adapters of Hugging Face PEFT's prompt tuning (Lester et al. 2021, arXiv 2104.08691).

PEFT puts an adapter's virtual tokens before everything, BOS included. A prompt that stands between BOS and the text
(``front``) gets BOS' own embedding as its first virtual token, so that PEFT's model, given token ids without BOS, reads
the same. One in the answer cue does not go with PEFT's own forward pass: the README's code puts its rows there.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``, which are PEFT's; ``prompt.safetensors``, the
whole prompt; and ``README.md``, a model card with code.
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
"""Architectures whose input embeddings mean the same to transformers: tests compare their logits."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PROMPT = "prompt.safetensors"
_KEY = "prompt_embeddings"


def write_adapter(prompt: Prompt, folder: Path, scorer: Scorer, task: Task, base_model: str | None) -> Path:
    """Arguments and errors as for `fedbpt.exchange.export_prompt`."""
    prompt.check(scorer)
    _check_architecture(scorer)
    if task.labels != prompt.labels:
        raise ConfigError(f"the prompt is for labels {list(prompt.labels)}, the task has {list(task.labels)}")
    known = known_model(prompt.model_name, prompt.model_fingerprint)
    base = base_model or (known.original if known else None)
    if base is None:
        raise ConfigError(
            f"{prompt.model_name} is not in the catalogue: give its weights' Hugging Face name or folder with --base"
        )
    bos = _bos_rows(prompt.spec, scorer)
    code = snippet(prompt, scorer, task, base, len(bos))
    use = "".join(f"{note}\n\n" for note in notes(prompt, scorer))
    use += f"```console\n$ pip install torch transformers peft\n```\n\n{fenced(code, 'python')}"
    rows = np.concatenate([bos, prompt.rows])
    _make(folder)
    files = {
        _CONFIG: json.dumps(_config(rows, base), indent=2).encode(),  # first: by it the next export knows its own
        _PROMPT: prompt.to_bytes(),
        _WEIGHTS: safetensors.numpy.save({_KEY: rows}, metadata={"format": "pt"}),
        "README.md": encode_card(model_card(prompt, use, "peft")),
    }
    write({folder / name: content for name, content in files.items()})
    return folder


def notes(prompt: Prompt, scorer: Scorer) -> tuple[str, ...]:
    """What whoever loads the adapter must know, a line each."""
    told = []
    n_bos = len(_bos_rows(prompt.spec, scorer))
    if prompt.spec.placement == "cue":
        told.append(
            f"The prompt stands in place of the answer cue's last {prompt.n_prompt} token(s), PEFT puts virtual tokens "
            "first: use README.md's code, not PEFT's generate()."
        )
    elif n_bos:
        told.append("The first virtual token is BOS: give the adapter token ids without it (add_special_tokens=False).")
    if prompt.label_bias.any() or prompt.n_words or prompt.others:
        told.append("An adapter has no label bias and no readout: README.md's code takes them from prompt.safetensors.")
    return tuple(told)


def read_adapter(folder: Path, scorer: Scorer, task: Task | None, template: int) -> Prompt:
    """Arguments and errors as for `fedbpt.exchange.import_prompt`."""
    config, rows = _read(folder)
    _check_architecture(scorer)
    if rows.shape[1] != scorer.n_embd:
        raise PromptError(
            f"{folder} has virtual tokens of {rows.shape[1]} numbers, {scorer.name} embeds in {scorer.n_embd}: "
            f"give the model that the adapter was trained for{_named(config)}"
        )
    if (folder / _PROMPT).is_file():
        return _continued(Prompt.load(folder / _PROMPT), rows, folder, scorer, task)
    if task is None:
        raise ConfigError(f"{folder} was not written by fedbpt: say what it is for with the task (--task)")
    if not 0 <= template < len(task.templates):
        raise ConfigError(f"task {task.name} has templates 0 to {len(task.templates) - 1}, not {template}")
    told = {"peft_version": config.get("peft_version"), "base_model": config.get("base_model_name_or_path")}
    return Prompt(
        rows=rows,
        spec=PromptSpec(placement="first", n_prompt=len(rows), d=1),
        task_name=task.name,
        labels=task.labels,
        template=task.templates[template],
        model_fingerprint=scorer.fingerprint,
        model_name=scorer.name,
        architecture=scorer.architecture,
        history=({"imported_from": "PEFT", **{name: value for name, value in told.items() if value}},),
        task=task,
    )


def _continued(prompt: Prompt, rows: NDArray[np.float32], folder: Path, scorer: Scorer, task: Task | None) -> Prompt:
    """The prompt that was exported to ``folder``, with the adapter's rows."""
    prompt.check(scorer)
    if task is not None and task.labels != prompt.labels:
        raise ConfigError(f"the adapter is for labels {list(prompt.labels)}, the task has {list(task.labels)}")
    bos = _bos_rows(prompt.spec, scorer)
    own = rows[len(bos) :]
    if own.shape != prompt.rows.shape:
        raise PromptError(f"{folder} has {len(rows)} virtual tokens, its {_PROMPT} says {len(bos) + prompt.n_prompt}")
    if not np.array_equal(rows[: len(bos)], bos):
        raise PromptError(
            f"{folder} was trained further, its first virtual token with it, which must be BOS: it cannot be used"
        )
    if np.array_equal(own, prompt.rows):
        return prompt
    return prompt.with_rows(own, ({"imported_from": "PEFT, trained further"},))


def _bos_rows(spec: PromptSpec, scorer: Scorer) -> NDArray[np.float32]:
    """Embeddings [n, n_embd] of what stands before the prompt: in ``front`` BOS, where the model wants it."""
    ids = bos_ids(scorer)
    return scorer.token_embeddings(ids if spec.placement == "front" else ids[:0])


def _check_architecture(scorer: Scorer) -> None:
    if scorer.architecture not in CHECKED:
        raise PromptError(
            f"{scorer.name} is of architecture {scorer.architecture}, for which logits were not compared with PEFT's "
            f"(only {', '.join(CHECKED)}): export to gguf or npy"
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


def _make(folder: Path) -> None:
    """Raises `PromptError` for a folder with other things in it: nothing of theirs is overwritten."""
    try:
        # what a killed export left under other names is nobody's
        has_others = folder.exists() and any(path.suffix != PARTIAL for path in folder.iterdir())
        if has_others and not (folder / _CONFIG).is_file():
            raise PromptError(f"{folder} is not empty and has no adapter: choose a new folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PromptError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The configuration, and the virtual tokens' embeddings [n, n_embd]."""
    if not (folder / _CONFIG).is_file():
        raise PromptError(f"{folder} has no {_CONFIG}: give the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind, where = config["peft_type"], config.get("task_type")
    except (OSError, *DECODE_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise PromptError(f"{folder / _CONFIG} is damaged: {error}") from error
    if kind != "PROMPT_TUNING" or where not in ("CAUSAL_LM", None) or config.get("num_transformer_submodules") == 2:
        raise PromptError(f"{folder} is a {kind} adapter for {where}: only PROMPT_TUNING for CAUSAL_LM can be imported")
    if not (folder / _WEIGHTS).is_file():
        raise PromptError(f"{folder} has no {_WEIGHTS}: save it anew with PEFT, pickled files are not read")
    try:
        content = (folder / _WEIGHTS).read_bytes()
        tensors = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
        found = tensors[_KEY]
        rows = _floats(found["dtype"], found["data"]).reshape(found["shape"])
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise PromptError(f"{folder / _WEIGHTS} holds no {_KEY} that can be read: {error}") from error
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise PromptError(f"{folder / _WEIGHTS}: {_KEY} must be [n, n_embd] finite numbers, is {list(rows.shape)}")
    return config, rows


def _floats(dtype: str, data: bytes) -> NDArray[np.float32]:
    """float32 [n] of a tensor's little-endian bytes; bfloat16 is the upper half of one."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _named(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    return f", {base}" if base else ""
