"""``fedbpt device``: take part in runs with this machine's model and data, called by the coordinator or calling it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

import typer

from fedbpt.cli.credentials import credentials_for, token_in
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import (
    AllowInsecure,
    AllowMetrics,
    AsJson,
    Ca,
    Cert,
    ClientCerts,
    GpuLayers,
    GpuName,
    Key,
    KvBudget,
    Model,
    Quiet,
    TaskName,
    Threads,
    allow_metrics,
)
from fedbpt.device.agent.server import AgentServer, announce
from fedbpt.device.agent.service import AgentService
from fedbpt.device.device import Device
from fedbpt.device.state_file import kept_state
from fedbpt.engine.native_scorer import DEFAULT_KV_BUDGET_BYTES, load_model
from fedbpt.errors import ConfigError
from fedbpt.machine.autostart import install
from fedbpt.machine.memory import kv_budget_within
from fedbpt.machine.pauses import TRIGGERS, Pauses
from fedbpt.models import locate, model_size
from fedbpt.net.tls import Tls, is_loopback
from fedbpt.net.tokens import Credentials
from fedbpt.plain_text import echo
from fedbpt.protocol.names import check_names
from fedbpt.protocol.specs import as_name
from fedbpt.secure.membership import Membership, identity_line, read_trusted
from fedbpt.tasks import Row, Task, load, read_task_rows

log = logging.getLogger(__name__)

NEAR: Final = " (for this machine only: --host 0.0.0.0 lets others call it)"

Coordinator = Annotated[
    str | None, typer.Option("--coordinator", help="Call in at this address instead of serving; works through NAT.")
]
EnrolCode = Annotated[
    str | None, typer.Option("--enrol", help="The code printed by `fedbpt devices invite`; needed once.")
]
CredentialsFile = Annotated[
    Path | None, typer.Option("--credentials", help="File of the token for calling in.", show_default=False)
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="Require callers to send the token in this file; created if absent.")
]
Secure = Annotated[
    bool, typer.Option("--secure", help="Refuse runs in which the coordinator sees this device's own results.")
]
IdentityFile = Annotated[
    Path | None,
    typer.Option("--identity", help="File of the key by which devices of secure runs know it; created if absent."),
]
TrustFile = Annotated[
    Path | None,
    typer.Option("--trust", help="File of the identities of a secure run's devices: no others' keys are accepted."),
]
MaxEpsilon = Annotated[
    float | None,
    typer.Option("--max-epsilon", min=0.01, help="Most ε (δ 1e-5) for the rows, in all runs; needs --state."),
]
StateFile = Annotated[
    Path | None,
    typer.Option("--state", help="File that remembers what private runs were sent; created if absent."),
]
UntilEof = Annotated[
    bool, typer.Option("--until-eof", help="Stop when standard input ends; for programs that start devices.")
]
MaxMemory = Annotated[
    int | None, typer.Option("--max-memory", min=1, help="Memory limit in MiB; reduces the KV cache to fit.")
]
PauseOn = Annotated[str, typer.Option("--pause-on", help="When to pause: battery, heat, user, separated by commas.")]
LoadLate = Annotated[
    bool, typer.Option("--load-late", help="Load the model when the first work arrives, to save memory until then.")
]
InstallService = Annotated[
    bool,
    typer.Option("--install-service", help="Write a service file that starts this command at boot, and exit."),
]
Force = Annotated[bool, typer.Option("--force", help="Let --install-service overwrite a different file.")]


def device(
    context: typer.Context,
    model: Model,
    data: Annotated[
        Path, typer.Option("--data", "-d", help="Training rows: JSONL or CSV. They never leave this machine.")
    ],
    task: TaskName,
    test: Annotated[Path | None, typer.Option(help="Rows for the final accuracy only.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows for the accuracy shown during the run.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any free one.")] = 8401,
    name: Annotated[
        str | None, typer.Option(help="Its name in every run. Default: the host name, or the name it was invited by.")
    ] = None,
    coordinator: Coordinator = None,
    enrol_code: EnrolCode = None,
    credentials: CredentialsFile = None,
    token_file: TokenFile = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    client_certs: ClientCerts = False,
    allow_insecure: AllowInsecure = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    kv_budget: KvBudget = DEFAULT_KV_BUDGET_BYTES // 2**20,
    max_memory: MaxMemory = None,
    pause_on: PauseOn = "",
    load_late: LoadLate = False,
    allow_metric: AllowMetrics = None,
    secure: Secure = False,
    identity: IdentityFile = None,
    trust: TrustFile = None,
    max_epsilon: MaxEpsilon = None,
    state: StateFile = None,
    install_service: InstallService = False,
    force: Force = False,
    until_eof: UntilEof = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Take part in runs with this machine's model and data, which stay here, until Ctrl-C.

    Example: fedbpt device --model smollm2-135m --data mine.jsonl --task ag-news --port 8401
    """
    chosen, rows = _rows(task, data, dev, test)  # before the model, to report a wrong file early
    allow_metrics(allow_metric, chosen)
    pauses = _pauses(pause_on, shown=not (quiet or as_json))
    if name is not None:
        check_names([name], "device")
    membership = _membership(secure, identity, trust)
    if max_epsilon is not None and state is None:
        raise ConfigError(
            "--max-epsilon needs --state FILE, which remembers what was spent when the device starts again",
            field="--state",
        )
    tls = Tls(cert, key, ca, client_certs)
    token = token_in(token_file) if token_file else None
    compute_kv_bytes = partial(_kv_bytes, model, kv_budget, max_memory)
    link = _link(coordinator, enrol_code, credentials, tls, allow_insecure, name, compute_kv_bytes)
    kv_bytes = compute_kv_bytes()
    if install_service:
        _install(context, max_memory, force, as_json)
        return
    scorer = load_model(
        model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu, kv_budget_bytes=kv_bytes, late=load_late
    )
    own_name = link.device if link else name or as_name(socket.gethostname())
    known, keep = (None, None) if state is None else context.with_resource(kept_state(state))
    local = Device(
        own_name,
        scorer,
        *rows,
        task=chosen,
        state=known,
        membership=membership,
        max_epsilon=max_epsilon,
        keep=keep,
    )
    if max_epsilon is not None and not quiet:
        echo(f"ε spent so far: {local.epsilon_spent:.2f} of {max_epsilon:g}", err=True)
        if local.state.told_exactly:
            echo("hint: this device has also sent results without noise, which ε does not count", err=True)
    if identity is not None and not quiet:
        echo(identity_line(own_name, local.identity), err=True)
    if not load_late:
        print_hint(scorer, shown=not (quiet or as_json), task=chosen)
        local.measure_speed()  # for `fedbpt tune --plan`
    if until_eof:
        threading.Thread(target=_stop_at_eof, name="fedbpt-until-eof", daemon=True).start()
    service = AgentService(local, pause=pauses.reason)
    ready = _ready_callback(local, len(rows[0]), link, as_json, quiet)
    if link is None:
        AgentServer(service, host, port, tls=tls, token=token, on_ready=ready, allow_insecure=allow_insecure).run()
    else:
        _call_in(service, link, tls, allow_insecure, ready)


def _membership(only: bool, identity: Path | None, trust: Path | None) -> Membership:
    trusted = None if trust is None else read_trusted(trust)
    if trusted is not None and identity is None:
        raise ConfigError(
            "--trust needs --identity, by which the others know this device: give both", field="--identity"
        )
    private = None if identity is None else hashlib.sha256(token_in(identity).encode()).digest()
    return Membership(private, trusted, only or trusted is not None)


def _link(
    coordinator: str | None,
    code: str | None,
    path: Path | None,
    tls: Tls,
    allow_insecure: bool,
    name: str | None,
    check: Callable[[], object],
) -> Credentials | None:
    """Credentials for calling in; None: the device is called. Raises `ConfigError` if it was invited by another name.

    ``check``: called before the one-time code is used; raises if the device cannot start.
    """
    if coordinator is not None and code is not None:
        check()
    link = credentials_for(coordinator, code, path, tls, allow_insecure, _print_status)
    if link is not None and name not in (None, link.device):
        raise ConfigError(
            f"this device was invited as {link.device}, which is its name in every run: omit --name", field="--name"
        )
    return link


def _call_in(
    service: AgentService, link: Credentials, tls: Tls, allow_insecure: bool, ready: Callable[[str], None]
) -> None:
    # Imported here because it loads an HTTP client, which a device that is called does not need.
    from fedbpt.device.agent.poller import Poller

    Poller(service, link, tls=tls, allow_insecure=allow_insecure, on_ready=ready, tell=_print_status).run()


def _ready_callback(
    local: Device, n_rows: int, link: Credentials | None, as_json: bool, quiet: bool
) -> Callable[[str], None]:
    """A function of the device's address that reports that the device is ready."""

    def ready(url: str) -> None:
        try:
            if as_json:
                announce(url)
            elif not quiet:
                how = "calls in at" if link else "serves on"
                near = "" if link or not is_loopback(urlsplit(url).hostname or "") else NEAR
                echo(f"{local.name} {how} {url}{near} with {local.scorer.name} and {n_rows} rows; Ctrl-C stops it")
        except OSError as error:  # standard output is closed or its disk is full: keep working
            log.warning("cannot print that the device is ready at %s: %s", url, error.strerror or error)

    return ready


def _print_status(line: str) -> None:
    echo(line, err=True)


def _rows(task: str, *files: Path | None) -> tuple[Task, list[list[Row]]]:
    chosen = load(task)
    return chosen, [[] if file is None else read_task_rows(chosen, file) for file in files]


def _kv_bytes(model: str, kv_budget: int, max_memory: int | None) -> int:
    """The KV budget in bytes; arguments are in MiB. Raises `ConfigError` if the model exceeds ``max_memory``."""
    weights = model_size(locate(model))
    wanted = kv_budget * 2**20
    return wanted if max_memory is None else kv_budget_within(max_memory * 2**20, weights, wanted)


def _pauses(given: str, shown: bool) -> Pauses:
    """Parse ``--pause-on``. Raises `ConfigError` for an unknown trigger."""
    chosen = [word.strip() for word in given.split(",") if word.strip()]
    unknown = [word for word in chosen if word not in TRIGGERS]
    if unknown:
        raise ConfigError(f"--pause-on {unknown[0]}: expected some of {', '.join(TRIGGERS)}", field="--pause-on")

    def report(reason: str) -> None:
        if shown:
            echo(f"paused: {reason}" if reason else "resumed", err=True)

    pauses = Pauses([trigger for trigger in TRIGGERS if trigger in chosen], report)
    for trigger in pauses.unsupported() if shown else []:
        echo(f"hint: this system does not report {trigger}: the device never pauses on it", err=True)
    return pauses


def _install(context: typer.Context, max_memory: int | None, force: bool, as_json: bool) -> None:
    """Write a service file that runs the given command without the options of installing and enrolling."""
    command = [sys.executable, "-m", "fedbpt", "device"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in ("install_service", "force", "enrol_code") or value in (None, parameter.default):
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            command += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    found = install(command, device=context.params.get("name"), max_memory=max_memory, force=force)
    if as_json:
        echo(json.dumps({"path": str(found.path), "enable": found.enable, "remove": found.remove}))
        return
    echo(f"wrote {found.path}\nenable: {found.enable}\nremove: {found.remove}\n{found.notes}")


def _stop_at_eof() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
