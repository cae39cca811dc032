"""``python -m tests.flower.simulate STORE NODES LAST``: a run in Flower's engine, stopped after round LAST (0: not)."""

from __future__ import annotations

import json
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedbpt.flower import FedBPT, client_app
from fedbpt.runs.events import Event, RoundClosed, RunStarted
from fedbpt.runs.store import RunStore
from tests.flower.toy_app import TASK, make_device, short
from tests.support.toy_scene import StopRunError

RAY = {"init_args": {"num_cpus": 1, "include_dashboard": False}, "client_resources": {"num_cpus": 1}}


def main(path: str, n_nodes: int, last: int) -> None:
    server_app = ServerApp()
    resumed: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, RunStarted):
            resumed.append(event.resumed)
        elif isinstance(event, RoundClosed) and last and event.round == last:
            raise StopRunError

    @server_app.main()
    def tune(grid: Grid, _context: Context) -> None:
        with RunStore(path) as store:
            strategy = FedBPT(TASK, short(), store, "r", devices=n_nodes, on_event=watch)
            try:
                strategy.start(grid)
            except StopRunError:
                return
        if strategy.result is not None:
            said = {"digest": strategy.result.digest, "correct": strategy.result.tuned.correct, "resumed": resumed[0]}
            print(json.dumps(said), flush=True)

    run_simulation(server_app, client_app(make_device), n_nodes, backend_config=RAY)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
