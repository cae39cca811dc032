"""A coordinator process that prints events: ``python -m tests.integration.toy_coordinator STORE ROUNDS URL...``."""

from __future__ import annotations

import signal
import sys

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.runs.events import Event
from fedbpt.runs.store import RunStore
from tests.support.toy_scene import ToyTask, settings


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes start with it ignored
    path, rounds, *urls = sys.argv[1:]
    clients = [HttpClient(url, name=f"device-{number}", retry_s=1.0) for number, url in enumerate(urls)]
    chosen = settings(rounds=int(rounds), deadline_s=10.0)

    def tell(event: Event) -> None:
        print(type(event).__name__, getattr(event, "round", ""), flush=True)

    with RunStore(path) as store:
        try:
            result = Federation(clients, ToyTask(), chosen, Pooled(4, popsize=6, seed=3), store, "r", tell).run()
        except KeyboardInterrupt:
            return 130
    print("digest", result.digest, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
