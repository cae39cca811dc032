"""A toy Flower App for real processes: its ServerApp and its ClientApp."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbpt.flower import FedBPT, client_app
from fedbpt.runs.store import RunStore
from tests.flower.toy_app import TASK, make_device, short

APP = """
[project]
name = "toy"
version = "1.0.0"
description = "toy"
license = "MIT"
dependencies = []
[tool.flwr.app]
publisher = "fedbpt"
[tool.flwr.app.components]
serverapp = "tests.flower.toy_processes:server_app"
clientapp = "tests.flower.toy_processes:node_app"
[tool.flwr.app.config]
store = "runs.db"
devices = 1
rounds = 2
"""

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    given = context.run_config
    with RunStore(str(given["store"])) as store:
        asked = short(rounds=int(given["rounds"]))
        FedBPT(TASK, asked, store, "r", devices=int(given["devices"])).start(grid)


node_app = client_app(make_device)
