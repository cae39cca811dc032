"""`fedbpt.tasks.with_examples`: templates that show some rows with their answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fedbpt import tasks
from fedbpt.errors import DataError
from fedbpt.tasks import Generation, Task, Template, with_examples
from tests.support.raises import raises

LABELLED = Task(
    name="mood",
    labels=("bad", "good"),
    templates=(
        Template(pattern="{text}\nMood:", label_words=(" b", " g")),
        Template(pattern="Read: {text} It is", label_words=(" bad", " good")),
    ),
    max_words=3,
)
TARGETS = Task(name="reply", templates=(Template(pattern="{text}\nA:", label_words=()),))


def test_each_template_is_followed_by_one_that_shows_the_rows() -> None:
    made = with_examples(LABELLED, [("I like it very much", "good"), ("no", 0)])
    assert made.templates[:2] == LABELLED.templates
    assert [template.pattern for template in made.templates[2:]] == [
        "I like it\nMood: g\n\nno\nMood: b\n\n{text}\nMood:",
        "Read: I like it It is good\n\nRead: no It is bad\n\nRead: {text} It is",
    ]
    assert [template.label_words for template in made.templates[2:]] == [(" b", " g"), (" bad", " good")]


def test_target_texts_are_shown_after_a_space() -> None:
    made = with_examples(TARGETS, [{"text": "two and two", "label": " four\n"}])
    assert made.templates[1].pattern == "two and two\nA: four\n\n{text}\nA:"
    assert made.identity == TARGETS.identity


@pytest.mark.parametrize(
    ("stop", "expected"), [(("\n",), ("\n",)), (("\n\n",), ("\n\n",)), ((), ("\n\n",)), (("END",), ("END", "\n\n"))]
)
def test_an_answer_ends_before_the_model_goes_on_with_examples(
    stop: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    task = msgspec.structs.replace(TARGETS, generation=Generation(stop=stop))
    assert with_examples(task, [("x", "y")]).generation == Generation(stop=expected)


def test_sets_of_rows_are_drawn_of_a_pool() -> None:
    pool = [(f"text {i}", f"answer {i}") for i in range(6)]
    made = with_examples(TARGETS, pool, n=2, sets=5)
    patterns = [template.pattern for template in made.templates]
    assert len(set(patterns)) == 6
    assert patterns[1] == "text 0\nA: answer 0\n\ntext 1\nA: answer 1\n\n{text}\nA:"
    assert all(pattern.count("answer") == 2 for pattern in patterns[1:])
    assert made == with_examples(TARGETS, pool, n=2, sets=5)
    assert made != with_examples(TARGETS, pool, n=2, sets=5, seed=1)
    assert len(with_examples(TARGETS, pool[:2], n=2, sets=2).templates) == 3  # the other order
    for few, n, sets in ((pool[:1], 2, 1), (pool[:2], 2, 3)):
        with raises(DataError, field="n"):
            with_examples(TARGETS, few, n=n, sets=sets)


@pytest.mark.parametrize("rows", [[], [("the {text}", "x")], [("x", "the {text}")]])
def test_rows_that_cannot_be_shown_are_refused(rows: Any) -> None:
    with pytest.raises(DataError):
        with_examples(TARGETS, rows)


def test_an_unknown_label_is_refused() -> None:
    with raises(DataError, field="label"):
        tasks.with_examples(LABELLED, [("a text", "fair")])
