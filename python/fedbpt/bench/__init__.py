"""Benchmarks of a machine: forward passes by batch, threads and weight format; comparison of two measurements."""

from __future__ import annotations

from fedbpt.bench.measurement import Measurement, measure

__all__ = ["Measurement", "measure"]
