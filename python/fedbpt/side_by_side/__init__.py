"""The original and the tuned model side by side."""

from __future__ import annotations

from fedbpt.side_by_side.sides import SideBySide

__all__ = ["SideBySide"]
