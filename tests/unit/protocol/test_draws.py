"""The draw of a round: values that coordinator and devices compute alike, for good."""

from __future__ import annotations

import hashlib

import numpy as np

from fedbpt.protocol.draws import Draw


def test_a_value_is_the_first_53_bits_of_a_documented_hash() -> None:
    text = b"fedbpt draw 1\0news\x007\x0012\0pi5"
    first = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    assert Draw("news", 7, 12).value("pi5") == (first >> 11) / 2**53


def test_values_are_uniform_and_differ_by_run_seed_round_and_device() -> None:
    values = np.sort([Draw("r", 0, round).value(f"d{i}") for round in range(20) for i in range(500)])
    assert np.abs(values - np.arange(10_000) / 10_000).max() < 0.02  # Kolmogorov-Smirnov, p < 0.001
    draws = [Draw("r", 1, 2), Draw("r2", 1, 2), Draw("r", 12, 2), Draw("r", 1, 22)]
    assert len({draw.value("a") for draw in draws} | {draws[0].value("b")}) == 5
