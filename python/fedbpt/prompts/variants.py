"""The variants that a run compares, by name: they appear in results, tables and model cards."""

from __future__ import annotations

BASELINES = {
    "calibrated": "calibration only",
    "probe": "readout without prompt",
    "prompt": "tuned, without readout",
    "read": "tuned, with readout",
}
"""Variants that a result is compared with, besides zero-shot, with their names for people: the model without a prompt
and with a bias per label, or with a readout; the tuned prompt with a bias per label, or with a readout."""

UNSCORED = "the label words are too long to be scored: there is no zero-shot figure"
"""Said where a result has no zero-shot figure (`RunResult.is_unscored`)."""

NOT_BETTER = "held-out training rows do not show that the tuned prompt is better than none: the result has none"
"""Said where a run of target texts ships the model without a prompt (`RunResult.is_not_better`)."""

FUTILE = (
    "the search ended early: held-out training rows showed no gain over the readout without prompt; "
    "to search on, set stop_if_futile = false"
)
"""Said where an interim look ended the search (`RunResult.futile`)."""

VARIANTS = {"zero_shot": "zero-shot", **BASELINES, "tuned": "tuned"}
"""All variants with their names for people, in the order in which a run produces them."""
