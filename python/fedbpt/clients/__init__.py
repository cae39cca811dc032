"""How the coordinator reaches a device: one protocol, one contract (``tests/contract/test_clients.py``)."""

from __future__ import annotations

from fedbpt.clients.base import DeviceClient, ProgressCallback
from fedbpt.clients.http import HttpClient
from fedbpt.clients.in_process import InProcessClient
from fedbpt.clients.mailbox import MailboxClient, PostOffice

__all__ = ["DeviceClient", "HttpClient", "InProcessClient", "MailboxClient", "PostOffice", "ProgressCallback"]
