"""The code blocks of a Markdown page and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- not run: (?P<reason>.+?) -->\n *)?```(?P<language>.*)\n(?P<text>(?s:.*?))^ *```$",
    re.MULTILINE,
)
_PROMPT = re.compile(r"(?:([\w-]*)\$|#) +(.*)")
_OPERATORS = frozenset({"&&", ";", "|", "<", ">"})


class Block(NamedTuple):
    """A fenced block. ``text`` is without the block's own indentation.

    ``not_run``: the reason that the page gives by ``<!-- not run: REASON -->`` on the line before it; else empty.
    """

    language: str
    text: str
    not_run: str = ""


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    found = []
    for match in _BLOCK.finditer(page):
        lines = [line.removeprefix(match["indent"]) for line in match["text"].splitlines()]
        found.append(Block(match["language"], "\n".join(lines) + "\n", match["reason"] or ""))
    return found


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """(host, command) for each prompt of a console block: ``device$ fedbpt …`` has host ``device``, ``$ …`` has none.

    Trailing comments are dropped; a line that ends in a backslash continues on the next. ``# …`` is a root prompt.
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        if prompt := _PROMPT.match(line):
            yield prompt[1] or "", " ".join(re.sub(r"\s#.*", "", prompt[2]).split())


def programs(command: str) -> Iterator[list[str]]:
    """The words of each program in a command line, without ``sudo``, variables set for it, and redirections."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if word in _OPERATORS and not redirected:
            if words:
                yield words
            words = []
            redirected = word in "<>"
        elif redirected:
            redirected = False
        elif words or not (word == "sudo" or re.match(r"[A-Z_]+=", word)):
            words.append(word)
