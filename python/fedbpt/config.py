"""Run files: TOML → `RunConfig`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fedbpt.errors import ConfigError, FedbptError
from fedbpt.runs import RunSettings


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run file.

    ::

        run = "news"                     # its name in the store; started again, it is resumed
        task = "ag-news"                 # or the path of a task file
        devices = ["http://pi5:8401", "http://pixel:8401"]
        model = "smollm2-135m"           # on this machine too: to write the prompt file (optional)
        store = "runs/runs.db"
        prompt_file = "runs/news.safetensors"

        [settings]                       # fields of fedbpt.runs.RunSettings
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


def load_config(path: str | Path) -> RunConfig:
    """Read a run file.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a value that cannot be.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror or error}") from error
    try:
        return msgspec.toml.decode(content, type=RunConfig)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        raise ConfigError(f"{path}: {cause if isinstance(cause, FedbptError) else error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, ImportError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
