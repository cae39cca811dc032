"""Options of ``fedbpt tune --data``: a run whose only device is this machine, with or without a run file."""

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
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Row, Task, read_task_rows
from fedbpt.tasks.fields import listed


@dataclass(frozen=True)
class InlineSettings:
    """Options that take the place of a run file. None: not given."""

    task: str | None = None
    run: str | None = None
    store: Path | None = None
    evaluations: int | None = None
    seconds: float | None = None
    seed: int | None = None

    def config(self, run_file: Path | None, model: str | None) -> tuple[RunConfig, Task]:
        """The run file and task of a run on this machine.

        Raises `ConfigError` if model or task is missing or given twice, or the run file names devices.
        """
        if run_file is not None:
            self.reject_with(run_file)
            config, task = load_config(run_file)
            if config.devices:
                raise ConfigError(
                    f"{run_file} names devices, but --data runs on this machine: remove one of the two", field="--data"
                )
            if (config.model or model) is None:
                raise ConfigError(f"no model given: set model in {run_file}, or use --model", field="--model")
            settings = settings_alone(config.settings)
            return msgspec.structs.replace(config, model=model or config.model, settings=settings), task
        if self.task is None or model is None:
            missing = "--task" if self.task is None else "--model"
            raise ConfigError(
                f"{missing} is missing: a run on this machine needs --model, --task and --data", field=missing
            )
        task = tasks.load(self.task)
        settings = settings_for(task, Budget(self.evaluations, seconds=self.seconds), self.seed or 0)
        found = RunConfig(task=self.task, run=self.run or as_name(task.name), model=model, settings=settings)
        return found if self.store is None else msgspec.structs.replace(found, store=str(self.store)), task

    def config_to_hand_in(self, run_file: Path | None, model: str | None) -> tuple[RunConfig, Task]:
        """The run file and task of a run over the devices of a coordinator; ``model`` takes the run file's place.

        Raises `ConfigError` if the task is missing or given twice, or the run file names devices.
        """
        if run_file is not None:
            self.reject_with(run_file)
            config, task = load_config(run_file)
            if config.devices:
                raise ConfigError(
                    f"{run_file} names devices, but those of a coordinator call in: remove devices, or --coordinator",
                    field="devices",
                )
            return msgspec.structs.replace(config, model=model or config.model), task
        if self.task is None:
            raise ConfigError("--task is missing: a run needs a run file, or --task", field="--task")
        task = tasks.load(self.task)
        alone = settings_for(task, Budget(self.evaluations, seconds=self.seconds), self.seed or 0)
        many = RunSettings()
        settings = msgspec.structs.replace(
            alone, quorum=many.quorum, deadline_s=many.deadline_s, stragglers=many.stragglers
        )
        return RunConfig(task=self.task, run=self.run or as_name(task.name), model=model, settings=settings), task

    def reject_with(self, run_file: Path) -> None:
        """Raise `ConfigError` if any of these options is given besides ``run_file``."""
        for option in fields(self):
            if getattr(self, option.name) is not None:
                raise ConfigError(
                    f"--{option.name} cannot be combined with a run file: set {option.name} in {run_file}",
                    field=f"--{option.name}",
                )


@dataclass(frozen=True)
class Files:
    """Files of this machine's rows: for training, for accuracy during the run, and for the final accuracy."""

    data: Path
    dev: Path | None = None
    test: Path | None = None

    def rows(self, task: Task) -> Sequence[list[Row]]:
        """Read each file; no rows for one that is not given. Raises `DataError`."""
        return [[] if file is None else read_task_rows(task, file) for file in (self.data, self.dev, self.test)]

    def warnings(self, task: Task, rows: Sequence[list[Row]]) -> list[str]:
        """What makes results of these rows misleading."""
        train = {text for text, _ in rows[0]}
        found = []
        for name, own in zip(("dev", "test"), rows[1:], strict=True):
            same = sum(text in train for text, _ in own)
            if same:
                found.append(f"{same} of {len(own)} rows of --{name} are training rows: their figures say little")
        missing = [label for i, label in enumerate(task.labels) if not any(target == i for _, target in rows[0])]
        if missing:
            found.append(f"there are no training rows of {listed(missing)}")
        return found
