"""All architectures that are compared with transformers, by name."""

from __future__ import annotations

import dense
import layer_norm
import mixtures
import windows
from architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for module in (dense, layer_norm, mixtures, windows)
    for architecture in module.ARCHITECTURES
}
