"""Templates under which a text's hidden states are read, besides the task's own."""

from __future__ import annotations

from typing import Final

import msgspec

from fedbpt.protocol.specs import Template
from fedbpt.tasks.task import Task

PATTERNS: Final = ("Question: {text}\nAnswer:", "{text}\nThis is about", "{text}\nIn one word, this is")
"""What a text is read for decides more than the layer; which of these suits a task, its rows decide."""

MAX_TEMPLATES: Final = 6
"""Templates that are read: each costs a device the tokens of its cue, and memory for its rows' states."""


def reading_templates(task: Task, selected: Template) -> tuple[Template, ...]:
    """Templates to read besides ``selected``: the task's others, then `PATTERNS` with its label words."""
    found = [template for template in task.templates if template != selected]
    known = {template.pattern for template in task.templates}
    found += [msgspec.structs.replace(selected, pattern=pattern) for pattern in PATTERNS if pattern not in known]
    return tuple(found[: MAX_TEMPLATES - 1])
