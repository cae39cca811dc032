"""A run of ``fedbpt tune --data``: this machine is its one device, and no run file is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

from fedbpt import tasks
from fedbpt.api import Budget, settings_for
from fedbpt.coordinator.one_machine import settings_alone
from fedbpt.errors import ConfigError
from fedbpt.protocol.specs import as_name
from fedbpt.runs.run_file import RunConfig, load_config
from fedbpt.tasks import Row, Task, read_task_rows


@dataclass(frozen=True)
class Chosen:
    """What options say where there is no run file to say it. None: not given."""

    task: str | None = None
    run: str | None = None
    store: Path | None = None
    evaluations: int | None = None
    seconds: float | None = None
    seed: int | None = None

    def config(self, run_file: Path | None, model: str | None) -> tuple[RunConfig, Task]:
        """Of a run on this machine. Raises `ConfigError` where model or task is missing, or given twice."""
        if run_file is not None:
            self.refuse(run_file)
            config, task = load_config(run_file)
            if config.devices:
                raise ConfigError(f"{run_file} names devices, and --data is for a run on this machine: leave one out")
            if (config.model or model) is None:
                raise ConfigError(f"--model is missing: name it in {run_file} or with --model")
            settings = settings_alone(config.settings)
            return msgspec.structs.replace(config, model=model or config.model, settings=settings), task
        if self.task is None or model is None:
            missing = "--task" if self.task is None else "--model"
            raise ConfigError(f"{missing} is missing: a run on this machine takes --model, --task and --data")
        task = tasks.load(self.task)
        settings = settings_for(task, Budget(self.evaluations, seconds=self.seconds), self.seed or 0)
        found = RunConfig(task=self.task, run=self.run or as_name(task.name), model=model, settings=settings)
        return found if self.store is None else msgspec.structs.replace(found, store=str(self.store)), task

    def refuse(self, run_file: Path) -> None:
        """Raises `ConfigError` where an option is given that is the run file's to say."""
        for field in fields(self):
            if getattr(self, field.name) is not None:
                raise ConfigError(f"--{field.name} goes without a run file: set {field.name} in {run_file}")


@dataclass(frozen=True)
class Files:
    """This machine's rows: to tune on, to watch the run by, to report on."""

    data: Path
    dev: Path | None = None
    test: Path | None = None

    def rows(self, task: Task) -> Sequence[list[Row]]:
        """Of each file. Raises `DataError`."""
        return [[] if file is None else read_task_rows(task, file) for file in (self.data, self.dev, self.test)]
