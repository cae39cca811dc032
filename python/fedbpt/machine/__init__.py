"""The machine: hardware information, energy, memory, pauses, autostart, and files from the package index."""
