"""Run files: TOML → `RunConfig`."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fedbpt import tasks
from fedbpt.checking import DECODE_ERRORS
from fedbpt.errors import ConfigError, FedbptError
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Task


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run file.

    ::

        run = "news"                     # its name in the store; started again, it is resumed
        task = "ag-news"                 # or the path of a task file, from here or from the run file's folder
        devices = ["http://pi5:8401", "http://pixel:8401"]
        model = "smollm2-135m"           # on this machine too: to write the prompt file (optional)
        store = "runs/runs.db"
        prompt_file = "runs/news.safetensors"   # where a model is given: default, RUN.safetensors beside the store

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
    """Read a run file and the task that it names: a built-in one, or a task file, first looked for beside the run file.

    What ``settings`` leaves out follows from the rest: ``prompt.seed`` is the run's, ``objective.max_text_tokens`` the
    task's.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a value that cannot be, no such task.
        TaskError: a task file whose templates cannot work.
    """
    path = Path(path)
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror or error}") from error
    try:
        raw = msgspec.toml.decode(content)
    except DECODE_ERRORS as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    _decoded(path, raw)  # before the task is read: complain about the file itself first
    beside = path.parent / raw["task"]
    task = tasks.load(beside if os.path.isfile(beside) else raw["task"])  # noqa: PTH113 - False for what names no file
    raw["settings"] = with_defaults(raw.get("settings", {}), task)
    return _decoded(path, raw), task


def with_defaults(settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Fields of `RunSettings` with those that follow from others: see `load_config`."""
    prompt = {"seed": settings.get("seed", 0), **settings.get("prompt", {})}
    objective = {"max_text_tokens": task.max_text_tokens, **settings.get("objective", {})}
    return {**settings, "prompt": prompt, "objective": objective}


def _decoded(path: Path, raw: Any) -> RunConfig:
    try:
        return msgspec.convert(raw, RunConfig)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        raise ConfigError(f"{path}: {cause if isinstance(cause, FedbptError) else error}") from error
