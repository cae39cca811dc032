"""How good a prompt is on rows: losses, readout, mini-batches, privacy."""
