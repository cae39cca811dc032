"""The device's side of a federation: `AgentService` takes work; `fedbpt.agent.http` serves it over HTTP.

A device is called (`fedbpt.agent.server`), or calls in itself (`fedbpt.agent.poller`).
"""

from __future__ import annotations

from fedbpt.agent.service import AgentService, LocalDevice
from fedbpt.agent.worker import Worker

__all__ = ["AgentService", "LocalDevice", "Worker"]
