"""How the coordinator reaches a device: one protocol, one contract (``tests/contract/test_clients.py``)."""

from __future__ import annotations

from fedbpt.coordinator.clients.base import DeviceClient, ProgressCallback
from fedbpt.coordinator.clients.http import HttpClient
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.clients.mailbox import MailboxClient, PostOffice
from fedbpt.coordinator.clients.remote import RemoteDevice
from fedbpt.coordinator.clients.requests import TransportClient

__all__ = [
    "DeviceClient",
    "HttpClient",
    "InProcessClient",
    "MailboxClient",
    "PostOffice",
    "ProgressCallback",
    "RemoteDevice",
    "TransportClient",
]
