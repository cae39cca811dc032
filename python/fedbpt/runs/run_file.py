"""Read run files (TOML)."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fedbpt import tasks
from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import explain, from_builtins
from fedbpt.errors import ConfigError, FedbptError
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Task


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run file.

    ::

        run = "news"                     # name in the store; a run of this name is resumed
        task = "ag-news"                 # or a task file's path, relative to the run file or the current folder
        devices = ["http://pi5:8401", "http://pixel:8401"]
        model = "smollm2-135m"           # on this machine, to write the prompt file (optional)
        store = "runs/runs.db"
        prompt_file = "runs/news.safetensors"   # default with a model: RUN.safetensors next to the store

        [settings]                       # fields of fedbpt.runs.settings.RunSettings
        rounds = 100
        popsize = 16

        [settings.prompt]
        n_prompt = 1
    """

    task: str
    run: str = "run"
    devices: tuple[str, ...] = ()
    model: str | None = None
    store: str = "runs/runs.db"
    prompt_file: str | None = None
    settings: RunSettings = RunSettings()


def load_config(path: str | Path) -> tuple[RunConfig, Task]:
    """Read a run file and its task: a built-in one, or a task file, relative to the run file or the current folder.

    In ``settings``, ``prompt.seed`` defaults to the run's seed and ``objective.max_text_tokens`` to the task's.

    Raises:
        ConfigError: the file is missing or not TOML, or has an unknown key, an invalid value or an unknown task.
        TaskError: the task file has invalid templates.
    """
    path = Path(path)
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror or error}", field=str(path)) from error
    try:
        raw = msgspec.toml.decode(content)
    except DECODE_ERRORS as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", field=str(path)) from error
    _decoded(path, raw)  # report errors of the run file before those of its task
    relative = path.parent / raw["task"]
    task = tasks.load(relative if os.path.isfile(relative) else raw["task"])  # noqa: PTH113 - False for invalid paths
    raw["settings"] = with_defaults(raw.get("settings", {}), task)
    return _decoded(path, raw), task


def with_defaults(settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Fields of `RunSettings`, with the defaults that depend on other fields: see `load_config`."""
    prompt = {"seed": settings.get("seed", 0), **settings.get("prompt", {})}
    objective = {"max_text_tokens": task.max_text_tokens, **settings.get("objective", {})}
    return {**settings, "prompt": prompt, "objective": objective}


def _decoded(path: Path, raw: Any) -> RunConfig:
    try:
        return from_builtins(raw, RunConfig)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, FedbptError):
            raise ConfigError(f"{path}: {cause}", field=cause.field, limit=cause.limit) from error
        if isinstance(raw, dict) and "templates" in raw:
            raise ConfigError(f"{path} is a task file: give it as --task", field=str(path)) from error
        raise ConfigError(f"{path}: {explain(error, RunConfig)}", field=str(path)) from error
