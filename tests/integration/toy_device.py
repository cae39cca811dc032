"""A device process without a model: ``python -m tests.integration.toy_device NAME [--port P] [--slow S]``."""

from __future__ import annotations

import argparse
import sys

from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import serve
from fedbpt.errors import FedbptError
from tests.support.fake_device import FakeDevice


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--slow", type=float, default=0.0)
    given = parser.parse_args()
    try:
        serve(AgentService(FakeDevice(given.name, slow_s=given.slow)), port=given.port)
    except FedbptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
