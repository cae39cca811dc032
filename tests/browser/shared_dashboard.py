"""A running dashboard as on a network, on loopback: ``python -m tests.browser.shared_dashboard STORE RUN TOKEN``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.server import DashboardServer
from fedbpt.net.tokens import watch_token


class Shared(DashboardServer):
    @property
    def watch_link(self) -> str:
        return f"{self.url}/?token={watch_token(sys.argv[3])}"


def main() -> None:
    server = Shared(Path(sys.argv[1]), sys.argv[2], control=RunControl(), token=sys.argv[3])
    server.on_ready = lambda _url: print(json.dumps([server.link, server.watch_link]), flush=True)
    server.run()


if __name__ == "__main__":
    main()
