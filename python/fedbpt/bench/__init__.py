"""Measuring a machine: forward passes by batch, threads and weight format; and two measurements compared."""

from __future__ import annotations

from fedbpt.bench.measurement import Measurement, measure

__all__ = ["Measurement", "measure"]
