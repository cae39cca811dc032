"""Runs over Flower (https://flower.ai): its SuperLink and SuperNodes, or its simulation engine, carry the messages.

`FedBPT` is the strategy of a ServerApp, `client_app` makes the ClientApp; ``app/`` is a Flower App, ready to run.
Needs ``fedbpt[flower]``. See ``docs/flower.md``.
"""

# ruff: noqa: E402 - set the telemetry variable before importing Flower

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Final

from fedbpt.errors import MissingExtraError

_TELEMETRY = "FLWR_TELEMETRY_ENABLED"
_SENDER = sys.modules.get("flwr.supercore.telemetry")
if getattr(_SENDER, _TELEMETRY, "0") == "1":  # Flower's own commands import it before this module
    logging.getLogger(__name__).warning("Flower's telemetry is on: start Flower with %s=0", _TELEMETRY)
os.environ.setdefault(_TELEMETRY, "0")  # for flwr, if not imported yet, and for child processes

try:
    import flwr as _flwr  # noqa: F401
except ImportError as error:
    raise MissingExtraError("running on Flower", "flower") from error

APP: Final = Path(__file__).parent / "app"
"""The folder of the Flower App, for ``flwr run``."""

from fedbpt.flower.client import FlowerClient as FlowerClient
from fedbpt.flower.device import client_app as client_app
from fedbpt.flower.nodes import Nodes as Nodes
from fedbpt.flower.strategy import FedBPT as FedBPT
