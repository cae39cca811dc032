"""``fedbpt tune --coordinator``: hand a run to a coordinator that stays up, and follow it as a run of this process."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import typer

from fedbpt.api import require_model_of_run
from fedbpt.cli.credentials import known_token
from fedbpt.cli.options import print_json, status_printer
from fedbpt.cli.tuning import Output, print_outcome
from fedbpt.coordinator.service.remote_runs import RemoteRuns
from fedbpt.display.console import RunDisplay
from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.plain_text import echo
from fedbpt.runs.events import Event, RunStarted
from fedbpt.runs.run_file import RunConfig
from fedbpt.runs.submission import Job, Submission
from fedbpt.tasks import Task

INTERRUPTED: Final = 130

ADMIN_TOKEN: Final = Path("runs/admin.token")
"""Where `fedbpt coordinator` puts its token by default."""


@dataclass(frozen=True)
class Coordinator:
    """A coordinator that takes runs. ``token``: file of its admin token; None: the default one."""

    url: str
    token: Path | None
    tls: Tls
    allow_insecure: bool

    def connected(self) -> RemoteRuns:
        """Its runs. Raises `ConfigError` if there is no token."""
        token = self.token or ADMIN_TOKEN
        advice = "copy the file that `fedbpt coordinator` names when it starts, and give it with --admin-token FILE"
        if not token.exists():
            raise ConfigError(f"no admin token at {token}: {advice}", field="--admin-token")
        return RemoteRuns(self.url, known_token(token, advice), self.tls, self.allow_insecure)

    @property
    def options(self) -> list[str]:
        """The options that reach it, for commands that are printed."""
        files = {
            "--admin-token": self.token,
            "--ca": self.tls.ca,
            "--cert": self.tls.cert,
            "--key": self.tls.key,
        }
        given = [word for option, file in files.items() if file is not None for word in (option, str(file))]
        insecure = ["--allow-insecure"] if self.allow_insecure else []
        return ["--coordinator", self.url, *given, *insecure]


@dataclass(frozen=True)
class HandOver:
    """A run to hand in. ``scorer``: the model, to write the prompt; None: not available on this machine."""

    config: RunConfig
    task: Task
    scorer: NativeScorer | None
    output: Output
    expect: int | None
    fresh: bool
    detach: bool

    def to(self, coordinator: Coordinator) -> None:
        """Hand it in, and report its result as `fedbpt tune` does. Ctrl-C leaves it running there."""
        submission = Submission(
            run=self.config.run,
            task=self.task,
            settings=self.config.settings,
            model_fingerprint="" if self.scorer is None else self.scorer.fingerprint,
            expect=self.expect,
            fresh=self.fresh,
        )
        tell = status_printer(not self.output.shown)
        with coordinator.connected() as runs:
            job = runs.hand_in(submission)
            if self.detach:
                print_job(job, self.output.as_json)
                return
            display = RunDisplay(self.output.shown)

            def hear(event: Event) -> None:
                if isinstance(event, RunStarted) and self.scorer is not None:
                    require_model_of_run(self.scorer, event)  # now, rather than when the prompt is written
                display(event)

            try:
                with display:
                    result = runs.follow(self.config.run, hear, lambda job: tell(describe(job)), tell)
            except KeyboardInterrupt:
                same = "the same command without --fresh" if self.fresh else "the same command"
                cancel = shlex.join(["fedbpt", "runs", "cancel", self.config.run, *coordinator.options])
                echo(
                    f"fedbpt: run {self.config.run} goes on at {coordinator.url}; {same} follows it again,"
                    f" and this stops it: {cancel}",
                    err=True,
                )
                raise typer.Exit(INTERRUPTED) from None
        print_outcome(self.task, self.scorer, self.output, result, "the same command with --model MODEL")


def describe(job: Job) -> str:
    """A line about a run's state."""
    if job.state == "queued":
        ahead = "it is next" if not job.ahead else f"{job.ahead} run{'s'[: job.ahead > 1]} before it"
        return f"run {job.run}: queued, {ahead}"
    return f"run {job.run}: {job.state}{job.detail and f', {job.detail}'}"


def print_job(job: Job, as_json: bool) -> None:
    """Print a run's state, for people or as JSON."""
    if as_json:
        print_json(msgspec.to_builtins(job))
    else:
        echo(describe(job))
