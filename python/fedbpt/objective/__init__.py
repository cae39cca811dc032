"""Evaluation of prompts on rows: losses, readout, mini-batches, privacy."""
