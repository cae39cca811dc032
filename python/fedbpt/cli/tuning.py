"""The work of ``fedbpt tune``: run, show progress, report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedbpt.api import make_prompt, require_model_of_run
from fedbpt.cli.hint import print_hint
from fedbpt.cli.observe import Observers, Watch
from fedbpt.cli.options import print_json, status_printer
from fedbpt.cli.reach import Reach
from fedbpt.cli.report import print_cost, print_result, result_as_json
from fedbpt.coordinator.clients import DeviceClient, HttpClient
from fedbpt.coordinator.costs.estimate import RunCost, estimate
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.gc_policy import collect_between_rounds
from fedbpt.coordinator.ledger import has_result
from fedbpt.coordinator.one_machine import NAME, Ended, clients_of, digest_of_rows, run_alone
from fedbpt.dashboard.comparison import Comparison, models_of_run, questions_of
from fedbpt.dashboard.examples import Row
from fedbpt.device.device import Device
from fedbpt.display.console import RunDisplay
from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.errors import ConfigError, FederationError, RunStopped
from fedbpt.plain_text import echo
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.runs.events import Event, RoundClosed, RunStarted
from fedbpt.runs.result import RunResult
from fedbpt.runs.run_file import RunConfig
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Row as TaskRow
from fedbpt.tasks import Task

Begin: TypeAlias = Callable[[RunSettings], Federation]


@dataclass(frozen=True)
class Output:
    """Where and how results are written. ``prompt``: the prompt file; None: write none."""

    prompt: Path | None = None
    questions: Path | None = None
    as_json: bool = False
    quiet: bool = False

    @property
    def shown(self) -> bool:
        """Whether to print progress for people."""
        return not (self.quiet or self.as_json)


def prompt_path(config: RunConfig, given: Path | None, model: str | None) -> Path | None:
    """Path of the prompt file; None without ``model``, which is needed to compute the prompt's rows.

    Creates its folder, so that an impossible path is reported before the run.
    """
    named = given or (Path(config.prompt_file) if config.prompt_file else None)
    if model is None:
        if named is not None:
            raise ConfigError(
                "writing the prompt needs the devices' model on this machine: give it with --model", field="--model"
            )
        return None
    found = named or Path(config.store).parent / f"{config.run}.safetensors"
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


class Tuning:
    """A run over devices, or on this machine only.

    Args:
        scorer: the model, to write the prompt; None: not available on this machine.
        fresh: start over instead of resuming the stored run.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        scorer: NativeScorer | None,
        observers: Observers,
        output: Output,
        fresh: bool = False,
    ) -> None:
        self._config = config
        self._task = task
        self._scorer = scorer
        self._fresh = fresh
        self._observers = observers
        self._output = output
        self._offered: Sequence[Row] = () if output.questions is None else questions_of(task, output.questions)
        self._tell = status_printer(not output.shown)
        self._addresses: Mapping[str, str] = {}  # of the devices that are called, by name

    def run_over(self, reach: Reach) -> None:
        """Run over devices."""
        config = self._config
        with self._opened() as (store, watch, release):
            stored = None if self._fresh else store.find_run(config.run)
            finished = stored is not None and has_result(store, config.run, self._task, config.settings)
            known = store.addresses(config.run) if stored else {}
            with reach.clients(known, finished, self._tell, config.settings.quorum) as clients:
                watch.meet(clients)
                self._addresses = {client.name: client.url for client in clients if isinstance(client, HttpClient)}
                self._run(store, watch, lambda: clients, "", _run_to_end)
                release()
                watch.wait_for_pages(self._tell)

    def run_here(self, rows: Sequence[list[TaskRow]]) -> None:
        """Run on this machine. After Ctrl-C, writes the best result so far, then raises `RunStopped`."""
        device = self._device(rows)
        settings = self._config.settings
        device.check_fit(settings.for_labels(self._task.labels, self._task.generation).objective, settings.prompt)
        with self._opened() as (store, watch, release), clients_of(device) as client:
            ended = self._run(store, watch, lambda: [client()], digest_of_rows(*rows), run_alone)
            release()
            if not ended.interrupted:
                watch.wait_for_pages(self._tell)
        if ended.interrupted:
            raise RunStopped("the run was stopped: run the same command to resume it")

    def _device(self, rows: Sequence[list[TaskRow]]) -> Device:
        assert self._scorer is not None
        return Device(NAME, self._scorer, *rows, task=self._task)

    @contextmanager
    def _opened(self) -> Iterator[tuple[RunStore, Watch, Callable[[], None]]]:
        """The run's store, its observers, and a function that releases the lock on the run."""
        with ExitStack() as stack:
            store = stack.enter_context(RunStore(self._config.store))
            working = stack.enter_context(ExitStack())
            working.enter_context(store.held(self._config.run))
            watch = stack.enter_context(self._observers.watching(store.path, self._config.run, self._tell))
            yield store, watch, working.close

    def _run(
        self,
        store: RunStore,
        watch: Watch,
        clients: Callable[[], Sequence[DeviceClient]],
        rows: str,
        run: Callable[[Begin, RunSettings], Ended],
    ) -> Ended:
        display = RunDisplay(self._output.shown)
        has_stored_rounds = not self._fresh  # of this run, rather than of the one that it replaces

        def tell(event: Event) -> None:
            nonlocal has_stored_rounds
            has_stored_rounds = has_stored_rounds or isinstance(event, RoundClosed)
            if isinstance(event, RunStarted):
                store.record_addresses(event.run, self._addresses)
                if self._scorer is not None:
                    require_model_of_run(self._scorer, event)  # now, rather than when the prompt is written
            display(event)
            watch(event)
            collect_between_rounds(event)

        def begin(settings: RunSettings) -> Federation:
            control = self._observers.control
            fresh = self._fresh and not has_stored_rounds
            return Federation(
                clients(),
                self._task,
                settings,
                settings.aggregator(),
                store,
                self._config.run,
                tell,
                None if control.stopped else control,  # after a stop, the final evaluation must not be stopped again
                fresh,
                rows,
            )

        if self._scorer is not None:
            print_hint(self._scorer, self._output.shown, self._task)
        try:
            with display:
                ended = run(begin, self._config.settings)
        except (KeyboardInterrupt, RunStopped) as stop:
            if has_stored_rounds:
                raise RunStopped("the run was stopped: run the same command to resume it") from stop
            raise KeyboardInterrupt from stop
        self._report(ended.result, watch)
        return ended

    def _report(self, result: RunResult, watch: Watch) -> None:
        config = self._config
        task = self._task
        scorer = self._scorer
        if scorer is not None:
            watch.compare(
                Comparison(lambda: models_of_run(scorer, task, result), task.labels, self._offered, watch.devices)
            )
        export = f"fedbpt runs export {config.run} --store {config.store} --model MODEL --out PROMPT.safetensors"
        print_outcome(task, scorer, self._output, result, export)


def print_outcome(task: Task, scorer: NativeScorer | None, output: Output, result: RunResult, export: str) -> None:
    """Write the prompt file, if there is the model, and print the result. ``export``: the command that writes it."""
    saved = None
    if scorer is not None and output.prompt is not None:
        saved = make_prompt(scorer, task, result).save(output.prompt)
    if output.as_json:
        print_json(result_as_json(result, saved))
        return
    print_result(result, saved)
    if saved is None and not output.quiet:
        echo(f"to write its prompt: {export}")


def _run_to_end(begin: Begin, settings: RunSettings) -> Ended:
    return Ended(begin(settings).run(), False)


def print_plan(config: RunConfig, task: Task, reach: Reach, output: Output) -> None:
    """Print what the run will cost on its devices, leaving out those that cannot take part.

    Raises `DeviceError` if a device does not respond.
    """

    async def ask(client: DeviceClient) -> DeviceInfo:
        try:
            return await client.status()
        finally:
            await client.aclose()

    async def ask_all(clients: Sequence[DeviceClient]) -> list[DeviceInfo]:
        return list(await asyncio.gather(*(ask(client) for client in clients)))

    tell = status_printer(not output.shown)
    with reach.clients({}, False, tell) as clients:
        infos = [info for info in asyncio.run(ask_all(clients)) if _can_take_part(info, task, tell)]
    if not infos:
        raise FederationError("no device can take part: start them with the run's task")
    print_cost(_cost(config, task, infos), output.as_json)


def _can_take_part(info: DeviceInfo, task: Task, tell: Callable[[str], None]) -> bool:
    found = misfit(info, None, task.identity)
    if found is not None:
        tell(f"device {info.name} cannot take part: it {found.reason}")
    return found is None


def print_plan_here(config: RunConfig, task: Task, device: Device, as_json: bool) -> None:
    """Print what the run will cost on this machine."""
    device.measure_speed()
    print_cost(_cost(config, task, [device.info()]), as_json)


def _cost(config: RunConfig, task: Task, infos: Sequence[DeviceInfo]) -> RunCost:
    return estimate(config.settings, task, infos, config.settings.aggregator())
