"""Runs on Flower (https://flower.ai): its SuperLink and SuperNodes, or its simulation engine, carry our messages.

`FedBPT` is the strategy of a ServerApp, `client_app` makes the ClientApp; ``app/`` is a Flower App, ready to run.
Needs ``fedbpt[flower]``. See ``docs/flower.md``.
"""

from __future__ import annotations

import os

from fedbpt.errors import MissingExtraError

# Before flwr is imported: what this process starts inherits it. `flwr` and `flower-*` themselves are started before us.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

try:
    import flwr as _flwr  # noqa: F401
except ImportError as error:
    raise MissingExtraError("running on Flower", "flower") from error

from fedbpt.flower.client import FlowerClient as FlowerClient
from fedbpt.flower.device import client_app as client_app
from fedbpt.flower.nodes import Nodes as Nodes
from fedbpt.flower.strategy import FedBPT as FedBPT
