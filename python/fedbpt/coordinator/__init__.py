"""The coordinator's own server, for devices that call in: enrolment and mailboxes."""

from __future__ import annotations

from fedbpt.coordinator.server import CoordinatorServer

__all__ = ["CoordinatorServer"]
