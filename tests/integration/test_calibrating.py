"""`fedbpt.calibrate` with a real model."""

from __future__ import annotations

import fedbpt
from fedbpt.protocol.specs import Template
from fedbpt.tasks import Task


def test_no_label_is_preferred_for_nothing_by_a_real_model() -> None:
    scorer = fedbpt.load_model("smollm2-135m")
    words = (" negative", " positive")
    task = Task(
        name="reviews", labels=("bad", "good"), templates=(Template(pattern="{text}\nCategory:", label_words=words),)
    )
    good = ["I love it.", "Works very well, a joy to use.", "Excellent, thank you!", "Best buy of the year."]
    bad = ["I hate it.", "Broke on the first day.", "A waste of money, do not buy.", "Terrible sound, no support."]
    rows = [*((text, 1) for text in good), *((text, 0) for text in bad)]
    prompt = fedbpt.calibrate(scorer, task, good + bad)
    before, after = (fedbpt.evaluate(scorer, task, rows, which) for which in (None, prompt))
    assert set(before.predictions.tolist()) == {0}  # it says "negative" to everything
    assert after.accuracy >= 0.75
