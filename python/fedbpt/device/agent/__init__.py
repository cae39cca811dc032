"""Serve a device: `AgentService` accepts work, `fedbpt.device.agent.http` has its HTTP routes.

The coordinator calls the device (`fedbpt.device.agent.server`), or the device polls it (`fedbpt.device.agent.poller`).
"""

from __future__ import annotations

from fedbpt.device.agent.service import AgentService, LocalDevice
from fedbpt.device.agent.worker import Worker

__all__ = ["AgentService", "LocalDevice", "Worker"]
