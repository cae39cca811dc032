"""The device's side of a federation: `AgentService` takes work; `fedbpt.device.agent.http` serves it over HTTP.

A device is called (`fedbpt.device.agent.server`), or calls in itself (`fedbpt.device.agent.poller`).
"""

from __future__ import annotations

from fedbpt.device.agent.service import AgentService, LocalDevice
from fedbpt.device.agent.worker import Worker

__all__ = ["AgentService", "LocalDevice", "Worker"]
