"""What a page prints, to be run as it is printed: its code blocks in order, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

Language = Literal["console", "python", "toml"]

_BLOCK = re.compile(r"^( *)```(console|python|toml)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block; ``text`` without the indentation that it has in a list."""

    language: Language
    text: str


def blocks(page: str) -> list[Block]:
    """The blocks of a page in Markdown."""
    found = []
    for indent, language, text in _BLOCK.findall(page):
        lines = [line.removeprefix(indent) for line in text.splitlines()]
        found.append(Block(cast(Language, language), "\n".join(lines) + "\n"))
    return found


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """(host, command) of each prompt in a console block: ``device$ fedbpt …`` is of ``device``, ``$ …`` of ````.

    A comment after the command is left out, and a line that ends in a backslash goes on.
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        prompt = re.match(r"([\w-]*)\$ +(.*)", line)
        if prompt:
            yield prompt[1], " ".join(re.sub(r"\s#.*", "", prompt[2]).split())
