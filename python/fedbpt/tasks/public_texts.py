"""Made-up texts that are nobody's rows: what a model's states are like on them is public."""

from __future__ import annotations

from typing import Final

from fedbpt.protocol.seeding import generator

_WHO: Final = (
    *("the teacher", "a small company", "my brother", "the government", "an old friend", "the football team"),
    *(
        "a scientist",
        "our neighbor",
        "the bank",
        "a famous singer",
        "the president",
        "a group of children",
        "the doctor",
    ),
)
_DID: Final = (
    *("bought", "found", "lost", "talked about", "discovered", "won", "changed", "loved", "complained about"),
    *("built", "watched", "sold", "refused", "described"),
)
_WHAT: Final = (
    *("a car", "the match", "a strange story", "the price of oil", "a good book", "a city in Europe", "the movie"),
    *("a computer", "some food", "the war", "a picture", "the money", "a new medicine", "the longest river", "the law"),
)
_PATTERNS: Final = (
    "What is {what}?",
    "Who {did} {what}?",
    "Where did {who} see {what}?",
    "How many people {did} {what}?",
    "When was {what} first known?",
    "{who} {did} {what}.",
    "I think {who} {did} {what} yesterday, and it was great.",
    "{who} never {did} {what}, which is bad news.",
    "Breaking: {who} {did} {what}",
    "Please tell me about {what}.",
)


def public_texts(n: int, seed: int) -> list[str]:
    """``n`` short English texts of one or two sentences, the same ones for the same ``seed``."""
    rng = generator(seed, "public")

    def sentence() -> str:
        who, did, what, pattern = (each[int(rng.integers(len(each)))] for each in (_WHO, _DID, _WHAT, _PATTERNS))
        made = pattern.format(who=who, did=did, what=what)
        return made[0].upper() + made[1:]

    return [" ".join(sentence() for _ in range(1 + int(rng.integers(2)))) for _ in range(n)]
