"""The computer that this runs on: what it is, its energy and memory, its pauses, its files from the package index."""
