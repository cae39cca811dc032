"""What a person asks a device's model, with a tuned prompt and without, and what both answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from fedbpt.errors import WireError
from fedbpt.protocol.specs import Fingerprint, Message
from fedbpt.quantities import Count, NaturalInt, PositiveInt, Probability

MAX_TOKENS = 4096
"""Longest answer that may be asked for."""

DEFAULT_TOKENS = 64
"""Longest answer where nobody asks for another."""


Said: TypeAlias = Annotated[str, msgspec.Meta(max_length=2**20)]


class Question(Message, frozen=True):
    """Put ``text`` to the model as it is, and with a prompt: ``prompt`` is the content of its file (`Prompt.to_bytes`).

    ``max_text_tokens``: how the prompt's task cuts texts; None: as `fedbpt.side_by_side.sides.SideBySide` without a
    task. The others say how text is generated, where the prompt does not classify.
    """

    model_fingerprint: Fingerprint
    prompt: Annotated[bytes, msgspec.Meta(max_length=8 * 2**20)]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=100_000)]
    max_text_tokens: PositiveInt | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] = DEFAULT_TOKENS
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: NaturalInt | None = None
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()
    protocol: Literal[1] = 1


class Answer(Message, frozen=True):
    """What there is of the answers of the original and of the tuned model; all of them once ``done``.

    ``probabilities``: of the labels [n_labels] on each side, where the prompt classifies; else empty. ``texts``: what
    each side has said so far. ``n``: how many pieces that is.
    """

    probabilities: Annotated[tuple[tuple[Probability, ...], ...], msgspec.Meta(max_length=2)] = ()
    texts: tuple[Said, Said] = ("", "")
    n: Count = 0
    done: bool = False
    protocol: Literal[1] = 1


def check_answer(answer: Answer, labels: Sequence[str]) -> None:
    """Raises `WireError` unless a finished answer has a probability of each of ``labels`` on both sides, or texts."""
    if [len(side) for side in answer.probabilities] != [len(labels)] * (2 if labels else 0):
        raise WireError(f"the answer is not one for {len(labels)} labels")
