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


def reading_templates(templates: Sequence[Template], selected: Template) -> tuple[Template, ...]:
    """Templates to read besides ``selected``: the others of a task's ``templates``, then `PATTERNS` with its words."""
    found = [template for template in templates if template != selected]
    known = {template.pattern for template in templates}
    found += [msgspec.structs.replace(selected, pattern=pattern) for pattern in PATTERNS if pattern not in known]
    return tuple(found[: MAX_TEMPLATES - 1])
