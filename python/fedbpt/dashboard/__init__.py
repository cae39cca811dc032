"""The dashboard: a run in a browser (design: ``docs/dashboard.md``).

`state` collects what to show, without a user interface; `pages` shows it with NiceGUI (``fedbpt[dashboard]``), which
bundles all of its assets; `server` is the entry point.
"""

from __future__ import annotations

from typing import Final

DEFAULT_ADDRESS: Final = "127.0.0.1:8500"
