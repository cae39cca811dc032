"""`fedbpt.calibrate`: the model's preference for some label words is taken from texts alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fedbpt
from fedbpt import Prompt
from fedbpt.errors import DataError, TaskError
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.specs import Template
from fedbpt.tasks import Task
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

LABELS = ("bad", "good", "fair")
TEMPLATES = (
    Template(pattern="{text}\nMood:", label_words=(" b", " g", " f")),
    Template(pattern="{text}\nIt is", label_words=(" b", " g", " fair")),
)
TASK = Task(name="mood", templates=TEMPLATES, labels=LABELS)
TEXTS = [f"text number {i} of some" for i in range(30)]


def scores(template: Template) -> np.ndarray:
    """Log-probabilities [n, n_labels] of the label words after each of `TEXTS`."""
    scorer = ToyScorer()
    words = [scorer.tokenize(word, add_bos=False) for word in template.label_words]
    ids = [scorer.tokenize(template.pattern.format(text=text)) for text in TEXTS]
    plan = scorer.compile(ids, continuations=[words] * len(ids))
    found: np.ndarray = log_probabilities(plan.score(np.zeros((1, 0, scorer.n_embd), np.float32))[0].astype(float))
    return found


def test_each_templates_means_are_subtracted() -> None:
    prompt = fedbpt.calibrate(ToyScorer(), TASK, TEXTS)
    np.testing.assert_allclose(prompt.label_bias, -scores(TEMPLATES[0]).mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(prompt.other_weights[0, 0], -scores(TEMPLATES[1]).mean(axis=0), atol=1e-3)
    assert prompt.others == TEMPLATES[1:]
    assert prompt.history == ({"calibrated_on_texts": 30},)


def test_evaluate_averages_the_corrected_templates(tmp_path: Path) -> None:
    fedbpt.calibrate(ToyScorer(), TASK, TEXTS).save(tmp_path / "words.safetensors")
    prompt = Prompt.load(tmp_path / "words.safetensors")
    corrected = [log_probabilities(each - each.mean(axis=0)) for each in map(scores, TEMPLATES)]
    expected = (sum(corrected) / 2).argmax(axis=1)
    found = fedbpt.evaluate(ToyScorer(), TASK, [(text, 0) for text in TEXTS], prompt).predictions
    np.testing.assert_array_equal(found, expected)
    plain = fedbpt.evaluate(ToyScorer(), TASK, [(text, 0) for text in TEXTS]).predictions
    assert len(set(found.tolist())) > len(set(plain.tolist()))


def test_long_texts_are_cut_as_rows_are() -> None:
    task = Task(name="mood", templates=TEMPLATES, labels=LABELS, max_words=3)
    cut = fedbpt.calibrate(ToyScorer(), task, TEXTS)
    assert not np.allclose(cut.label_bias, fedbpt.calibrate(ToyScorer(), TASK, TEXTS).label_bias)
    short = [" ".join(text.split()[:3]) for text in TEXTS]
    np.testing.assert_array_equal(cut.label_bias, fedbpt.calibrate(ToyScorer(), TASK, short).label_bias)


@pytest.mark.parametrize("texts", [[], ["good", "  "]])
def test_texts_are_needed(texts: list[str]) -> None:
    with raises(DataError, field="texts"):
        fedbpt.calibrate(ToyScorer(), TASK, texts)


def test_a_task_of_target_texts_is_refused() -> None:
    with raises(TaskError, field="task"):
        fedbpt.calibrate(
            ToyScorer(), Task(name="t", templates=(Template(pattern="{text}\nA:", label_words=()),)), TEXTS
        )
