"""Templates under which a text's hidden states are read, besides the task's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from fedbpt.protocol.specs import Template

PATTERNS: Final = (
    "Question: {text}\nAnswer:",
    "{text}\nThis is about",
    "{text}\nThis makes me feel",
    "{text}\nIn one word, this is",
)
"""What a text is read for decides more than the layer; which of these suits a task, its rows decide."""

MAX_TEMPLATES: Final = 6
"""Templates that are read: each costs a device the tokens of its cue, and memory for its rows' states."""


LONG_TEXT: Final = 48
"""Mean tokens of a row's selection from which texts are long."""


def reading_templates(
    templates: Sequence[Template], selected: Template, long_texts: bool = False
) -> tuple[Template, ...]:
    """Templates to read besides ``selected``: the others of a task's ``templates``, then `PATTERNS` with its words.

    ``long_texts``: without a pattern that begins otherwise, under which each text is read a second time. It helps with
    questions, which are short.
    """
    found = [template for template in templates if template != selected]
    known = {template.pattern for template in templates}
    patterns = [each for each in PATTERNS if each.startswith("{text}") or not long_texts]
    found += [msgspec.structs.replace(selected, pattern=pattern) for pattern in patterns if pattern not in known]
    return tuple(found[: MAX_TEMPLATES - 1])
