"""A person's question to a device's model, and its replies with and without the tuned prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from fedbpt.errors import WireError
from fedbpt.protocol.specs import Fingerprint, Message
from fedbpt.quantities import Count, NaturalInt, PositiveInt, Probability

MAX_TOKENS = 4096
"""Upper bound of a reply's length, tokens."""

DEFAULT_TOKENS = 64
"""Default maximum length of a reply, tokens."""

Said: TypeAlias = Annotated[str, msgspec.Meta(max_length=2**20)]


class Question(Message, frozen=True):
    """Give ``text`` to the model without and with a prompt. ``prompt``: the bytes of its file (`Prompt.to_bytes`).

    ``max_text_tokens``: where the prompt's task truncates texts; None: as `fedbpt.side_by_side.sides.SideBySide` does
    without a task. The other fields control text generation and are unused if the prompt classifies.
    """

    model_fingerprint: Fingerprint
    prompt: Annotated[bytes, msgspec.Meta(max_length=15 * 2**20)]
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=100_000)]
    max_text_tokens: PositiveInt | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] = DEFAULT_TOKENS
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: NaturalInt | None = None
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=16)] = ()
    protocol: Literal[1] = 1


class Answer(Message, frozen=True):
    """The replies of the original and the tuned model so far; complete once ``done``.

    ``probabilities``: those of the labels [n_labels], one tuple per side, if the prompt classifies; else empty.
    ``texts``: the text of each side so far. ``n``: number of pieces so far.
    """

    probabilities: Annotated[tuple[tuple[Probability, ...], ...], msgspec.Meta(max_length=2)] = ()
    texts: tuple[Said, Said] = ("", "")
    n: Count = 0
    done: bool = False
    protocol: Literal[1] = 1


def check_answer(answer: Answer, labels: Sequence[str]) -> None:
    """Raise `WireError` unless a finished answer has a probability per label on both sides, or none without labels."""
    found = [len(side) for side in answer.probabilities]
    if found != [len(labels)] * (2 if labels else 0):
        raise WireError(
            f"expected probabilities of {len(labels)} labels on each side, got {found}", field="probabilities"
        )
