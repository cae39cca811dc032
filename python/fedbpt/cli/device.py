"""``fedbpt device``: this machine's model and data for a coordinator, which calls, or is called."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from fedbpt.agent.calls import enrol, origin
from fedbpt.agent.poller import Poller
from fedbpt.agent.server import AgentServer, announce
from fedbpt.agent.service import AgentService
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import (
    AllowInsecure,
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
)
from fedbpt.errors import ConfigError
from fedbpt.local import Device
from fedbpt.native_scorer import DEFAULT_KV_BUDGET_BYTES, load_model
from fedbpt.tasks import Row, Task, load, read_task_rows
from fedbpt.tls import Tls
from fedbpt.tokens import Credentials, default_credentials, new_token, read_private, write_private

Coordinator = Annotated[
    str | None, typer.Option("--coordinator", help="Call in at this address instead of serving: through NAT.")
]
EnrolCode = Annotated[str | None, typer.Option("--enrol", help="The code of `fedbpt devices invite`; needed once.")]
CredentialsFile = Annotated[
    Path | None, typer.Option("--credentials", help="Where the token for calling in is kept.", show_default=False)
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="Serve only who sends the token in this file; made if absent.")
]
UntilEof = Annotated[
    bool, typer.Option("--until-eof", help="Stop when standard input ends: for a program that starts devices.")
]


def device(
    model: Model,
    data: Annotated[Path, typer.Option("--data", "-d", help="Rows to tune on: JSONL or CSV. They stay here.")],
    task: TaskName,
    test: Annotated[Path | None, typer.Option(help="Rows that only report the final accuracy.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows that show the accuracy during the run.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any free one.")] = 8401,
    name: Annotated[str | None, typer.Option(help="What this device calls itself. Default: the host's name.")] = None,
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
    until_eof: UntilEof = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give this machine's model and data to a coordinator, until Ctrl-C: called by it, or calling in. The data stay.

    Example: fedbpt device --model smollm2-135m --data mine.jsonl --task ag-news --port 8401
    """
    chosen = load(task)
    train, dev_rows, test_rows = (_rows(chosen, path) for path in (data, dev, test))  # before the model: quick to tell
    tls = Tls(cert, key, ca, client_certs)
    token = _token(token_file) if token_file else None
    link = _credentials(coordinator, enrol_code, credentials or default_credentials(), tls, allow_insecure)
    scorer = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu, kv_budget_bytes=kv_budget * 2**20)
    print_hint(scorer, shown=not (quiet or as_json))
    own_name = link.device if link else name or socket.gethostname()

    def ready(url: str) -> None:
        if as_json:
            announce(url)
        elif not quiet:
            how = "calls in at" if link else "serves on"
            typer.echo(f"{own_name} {how} {url} with {scorer.name} and {len(train)} rows; Ctrl-C stops it")

    if until_eof:
        threading.Thread(target=_stop_at_eof, name="fedbpt-until-eof", daemon=True).start()
    local = Device(own_name, scorer, train, dev_rows, test_rows)
    local.measure_speed()  # for `fedbpt tune --plan`
    service = AgentService(local)
    if link is not None:
        Poller(service, link, tls=tls, allow_insecure=allow_insecure, on_ready=ready, tell=_tell).run()
        return
    AgentServer(service, host, port, tls=tls, token=token, on_ready=ready, allow_insecure=allow_insecure).run()


def _rows(task: Task, path: Path | None) -> list[Row]:
    return [] if path is None else read_task_rows(task, path)


def _credentials(
    coordinator: str | None, code: str | None, path: Path, tls: Tls, allow_insecure: bool
) -> Credentials | None:
    """What to call ``coordinator`` with: kept from before, or got for ``code`` and kept; None: the device is called."""
    if coordinator is None:
        if code is not None:
            raise ConfigError("--enrol needs the coordinator's address: --coordinator https://HOST:PORT")
        return None
    url = origin(coordinator, allow_insecure)
    if code is not None:
        made = enrol(url, code, tls=tls, allow_insecure=allow_insecure)
        made.save(path)
        return made
    if not path.exists():
        raise ConfigError(
            f"this device is not enrolled ({path} is absent): get a code there by `fedbpt devices invite NAME`,"
            " and give it with --enrol CODE"
        )
    kept = Credentials.load(path)
    if kept.coordinator != url:
        raise ConfigError(
            f"the token in {path} is for {kept.coordinator}, not {url}: enrol there (--enrol CODE, --credentials FILE)"
        )
    return kept


def _token(path: Path) -> str:
    """The token in ``path``, made if absent: the coordinator needs it too (`fedbpt tune --tokens`)."""
    if not path.exists():
        write_private(path, f"{new_token()}\n".encode())
    token = read_private(path).decode(errors="replace").strip()
    if not re.fullmatch(r"[\x21-\x7e]{16,}", token):
        raise ConfigError(f"{path} holds no token (16 or more ASCII characters): remove it, and one is made")
    return token


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _stop_at_eof() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
