"""The dashboard: a run in a browser (design: ``docs/dashboard.md``).

`state` knows what a run shows and no page; `pages` puts it on one, with NiceGUI (``fedbpt[dashboard]``), whose assets
all lie in its package. `server` is the only way in.
"""

from __future__ import annotations

from typing import Final

DEFAULT_ADDRESS: Final = "127.0.0.1:8500"
