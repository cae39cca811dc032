"""Templates under which hidden states are read."""

from __future__ import annotations

from fedbpt.protocol.specs import Template
from fedbpt.tasks.reading import MAX_TEMPLATES, PATTERNS, reading_templates

OWN = tuple(
    Template(pattern=pattern, label_words=(" a", " b")) for pattern in ("{text}\nIt is", "{text} so", "{text}:")
)


def test_the_tasks_own_templates_come_first_then_general_ones_with_its_words() -> None:
    found = reading_templates(OWN[:2], OWN[1])
    assert found[0] == OWN[0]
    assert [template.pattern for template in found[1:]] == list(PATTERNS)
    assert {template.label_words for template in found} == {(" a", " b")}


def test_long_texts_are_read_once_under_templates_that_begin_alike() -> None:
    found = reading_templates(OWN, OWN[0], long_texts=True)
    assert {template.pattern.partition("{text}")[0] for template in found} == {""}
    assert len(found) == MAX_TEMPLATES - 1
    assert any(template.pattern.startswith("Question") for template in reading_templates(OWN, OWN[0]))


def test_a_pattern_of_the_task_is_read_once() -> None:
    own = (OWN[0], Template(pattern=PATTERNS[1], label_words=(" x", " y")))
    assert [template.pattern for template in reading_templates(own, own[0])].count(PATTERNS[1]) == 1
