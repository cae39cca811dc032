"""``fedbpt tune``: coordinate a run over devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fedbpt.api import aggregator_for, make_prompt, require_model_of_run
from fedbpt.cli.devices import DEFAULT_REGISTRY
from fedbpt.cli.observe import Observers, Watch
from fedbpt.cli.options import (
    AllowInsecure,
    AsJson,
    Ca,
    Cert,
    ClientCerts,
    Dashboard,
    Key,
    Questions,
    Quiet,
    Registry,
    print_json,
    teller,
)
from fedbpt.cli.reach import Reach
from fedbpt.cli.report import print_cost, print_result, result_as_json
from fedbpt.clients import DeviceClient
from fedbpt.config import RunConfig, load_config
from fedbpt.dashboard.comparing import Comparison, comparing, questions_of
from fedbpt.display import RunDisplay
from fedbpt.errors import ConfigError, FederationError
from fedbpt.estimate import RunCost, estimate
from fedbpt.federation import Federation
from fedbpt.garbage import collect_between_rounds
from fedbpt.membership import misfit
from fedbpt.messages import DeviceInfo
from fedbpt.native_scorer import NativeScorer, load_model
from fedbpt.plain_text import echo
from fedbpt.runs import Event, RunResult, RunStarted
from fedbpt.store import RunStore
from fedbpt.tasks import Task
from fedbpt.tls import Tls

Addresses = Annotated[
    list[str] | None, typer.Option("--device", help="A device's address, as often as needed; adds to the file's.")
]
PromptFile = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the tuned prompt.")]
OwnModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The devices' model, here too: needed to write the prompt.")
]
Listen = Annotated[
    str | None, typer.Option("--listen", help="HOST:PORT where enrolled devices call in; --device adds others.")
]
Expect = Annotated[
    int | None, typer.Option(min=1, help="Begin when so many devices call in. Default: all enrolled or invited.")
]
Tokens = Annotated[Path | None, typer.Option("--tokens", help='Devices\' tokens: TOML lines "ADDRESS" = "TOKEN".')]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what is stored of this run, and start over.")]
Log = Annotated[Path | None, typer.Option("--log", help="Add what happens to this file, a line of JSON each.")]
Monitor = Annotated[
    str | None, typer.Option("--monitor", help="HOST:PORT to watch the run at: JSON, events, Prometheus metrics.")
]
MonitorToken = Annotated[
    Path | None, typer.Option("--monitor-token", help="The monitor asks for the token in this file; made if absent.")
]
DashboardToken = Annotated[
    Path | None,
    typer.Option("--dashboard-token", help="The dashboard asks for this file's token; made if absent."),
]
OnlyPlan = Annotated[
    bool, typer.Option("--plan", help="Ask the devices, print what the run will cost at most, and do nothing.")
]


def tune(
    run_file: Annotated[Path, typer.Argument(help="The run file (TOML): task, devices, settings.", show_default=False)],
    device: Addresses = None,
    prompt_file: PromptFile = None,
    model: OwnModel = None,
    listen: Listen = None,
    expect: Expect = None,
    registry: Registry = DEFAULT_REGISTRY,
    tokens: Tokens = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    client_certs: ClientCerts = False,
    allow_insecure: AllowInsecure = False,
    log: Log = None,
    monitor: Monitor = None,
    monitor_token: MonitorToken = None,
    dashboard: Dashboard = None,
    dashboard_token: DashboardToken = None,
    questions: Questions = None,
    fresh: Fresh = False,
    only_plan: OnlyPlan = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune over devices. Ctrl-C loses at most one round: the same command goes on where it stood.

    Example: fedbpt tune run.toml --device http://pi5:8401 --device http://pixel:8401
    """
    config, task = load_config(run_file)
    addresses = [*config.devices, *(device or [])]
    if not (addresses or listen):
        raise ConfigError(
            f"no devices: name them in {run_file} (devices = [...]) or with --device http://HOST:PORT, or let them"
            " call in (--listen HOST:PORT)"
        )
    reach = Reach(addresses, tokens, listen, expect, registry, Tls(cert, key, ca, client_certs), allow_insecure)
    observers = Observers(log, monitor, monitor_token, Tls(cert, key), allow_insecure, dashboard, dashboard_token)
    if only_plan:
        print_cost(_cost(config, task, reach, teller(as_json or quiet)), as_json)
        return
    offered = () if questions is None else questions_of(task, questions)
    model = model or config.model
    out = _prompt_path(config, prompt_file, model)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be is told at once
    scorer = load_model(model) if model else None

    def report(result: RunResult, observer: Watch) -> None:
        if scorer is not None:
            observer.compare(
                Comparison(lambda: comparing(scorer, task, result), task.labels, offered, observer.devices)
            )
        saved = make_prompt(scorer, task, result).save(out) if scorer is not None and out is not None else None
        _report(config, result, saved, as_json, quiet)

    _tune(config, task, reach, observers, scorer, fresh, report, shown=not (quiet or as_json))


def _report(config: RunConfig, result: RunResult, saved: Path | None, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(result_as_json(result, saved))
        return
    print_result(result, saved)
    if saved is None and not quiet:
        wanted = f"{config.run} --store {config.store} --model MODEL --out PROMPT.safetensors"
        echo(f"to write its prompt: fedbpt runs export {wanted}")


def _tune(
    config: RunConfig,
    task: Task,
    reach: Reach,
    observers: Observers,
    scorer: NativeScorer | None,
    fresh: bool,
    report: Callable[[RunResult, Watch], None],
    shown: bool,
) -> None:
    display = RunDisplay(shown)
    tell = teller(not shown)

    def watch(event: Event) -> None:
        if scorer is not None and isinstance(event, RunStarted):
            require_model_of_run(scorer, event)  # before the work, not when its prompt is to be written
        display(event)
        observer(event)
        collect_between_rounds(event)

    with ExitStack() as stack:
        store = stack.enter_context(RunStore(config.store))
        if fresh:
            store.delete_run(config.run)
        observer = stack.enter_context(observers.watching(store.path, config.run, tell))
        stored = store.find_run(config.run)
        finished = stored is not None and stored.status == "finished"
        clients = stack.enter_context(
            reach.clients(list(store.devices(config.run)), finished, tell, config.settings.quorum)
        )
        observer.meet(clients)
        aggregator = aggregator_for(config.settings)
        federation = Federation(clients, task, config.settings, aggregator, store, config.run, watch, observers.control)
        with display:
            result = federation.run()
        report(result, observer)
        observer.linger(tell)


def _cost(config: RunConfig, task: Task, reach: Reach, tell: Callable[[str], None]) -> RunCost:
    """What the run will cost on its devices; one that cannot take part is named and left out.

    Raises `DeviceError` where one does not answer.
    """

    async def ask(client: DeviceClient) -> DeviceInfo:
        try:
            return await client.status()
        finally:
            await client.aclose()

    async def ask_all(clients: Sequence[DeviceClient]) -> list[DeviceInfo]:
        return list(await asyncio.gather(*(ask(client) for client in clients)))

    with reach.clients([], False, tell) as clients:
        infos = [_able(info, task, tell) for info in asyncio.run(ask_all(clients))]
    able = [info for info in infos if info is not None]
    if not able:
        raise FederationError("no device can take part: start them with the run's task")
    return estimate(config.settings, task, able, aggregator_for(config.settings))


def _able(info: DeviceInfo, task: Task, tell: Callable[[str], None]) -> DeviceInfo | None:
    found = misfit(info, None, task.identity)
    if found is not None:
        tell(f"device {info.name} cannot take part: it {found.reason}")
    return info if found is None else None


def _prompt_path(config: RunConfig, given: Path | None, model: str | None) -> Path | None:
    """Where the prompt goes; None: nowhere, for want of the model that its rows are made with."""
    named = given or (Path(config.prompt_file) if config.prompt_file else None)
    if model is None:
        if named is not None:
            raise ConfigError("writing the prompt needs the model here too: give --model, as on the devices")
        return None
    return named or Path(config.store).parent / f"{config.run}.safetensors"
