"""A classification task put to a language model: templates, label words, and the token ids they become.

A text becomes ``head + text + cue``: the template's own words before the text (with BOS where the model was trained
with it), the text's first tokens, and the answer cue. Cue and label words are tokenised apart from the text, so that
the cue has the same ids for every text, and by the side of a neutral character, so that a tokenizer which adds a
space in front of what it is given (SentencePiece) does not add one in the middle.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.checking import DECODE_ERRORS
from fedbpt.errors import ConfigError, InputError, TaskError
from fedbpt.protocol.specs import CheckedMessage, Template
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.quantities import PositiveInt

DEFAULT_MAX_TEXT_TOKENS = 128

MAX_TEXT_BYTES = 2**20
"""Of a text in UTF-8: scorers tokenise no longer one."""

_SLOT = "{text}"
SENTINELS = ("1", "x", ")")
"""Beside at least one of these, a cue's first token does not merge."""


class Tokenizer(Protocol):
    """What a task asks of a model; a `fedbpt.engine.scorer.Scorer` satisfies it."""

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Token ids [n]. ``add_bos`` None: as the model was trained."""
        ...


class Task(CheckedMessage, frozen=True):
    """What to ask of a text.

    ``templates`` are candidates, each with a word per label; the shots select one. Without ``labels`` a task is to make
    target texts likely, which stand in ``label_column``. ``max_text_tokens`` bounds a text
    in the model's tokens, ``max_words`` (None: no bound) cuts it when rows are read. ``text_columns`` and
    ``label_column`` name the columns of its data files; the first text column that a file has is read. A text column
    may be made of several, for pairs: ``"{premise} So: {hypothesis}"``.
    Raises `TaskError` for a template that cannot work with any model.
    """

    name: str
    templates: tuple[Template, ...]
    labels: tuple[str, ...] = ()
    max_text_tokens: PositiveInt = DEFAULT_MAX_TEXT_TOKENS
    max_words: PositiveInt | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.strip():
            raise TaskError("a task needs a name")
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise TaskError(
                f"task {self.name!r} needs two or more distinct labels, or none for target texts, "
                f"has {list(self.labels)}"
            )
        if not self.templates:
            raise TaskError(f"task {self.name!r} needs at least one template")
        if not self.text_columns:
            raise TaskError(f"task {self.name!r} needs at least one text column")
        for template in self.templates:
            split_pattern(template)
            _check_words(template, self.labels)

    @property
    def identity(self) -> TaskIdentity:
        """What devices of one run must have in common; templates and ``max_text_tokens`` come with the run."""
        return TaskIdentity.of(self.name, self.labels, (self.text_columns, self.label_column, self.max_words))

    def clip(self, text: str) -> str:
        """``text`` with white space made single spaces, cut after ``max_words`` words."""
        return " ".join(text.split()[: self.max_words])


@checked
def load_task(path: str | Path) -> Task:
    """Read a task file: TOML, or JSON where the name ends in ``.json``.

    ::

        name = "support-tickets"
        labels = ["billing", "technical"]
        [[templates]]
        pattern = "{text}\\nDepartment:"
        label_words = [" billing", " technical"]

    Raises:
        ConfigError: no such file, not TOML/JSON, an unknown or missing key, a value of the wrong type.
        TaskError: a template that cannot work.
    """
    path = Path(path)
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(f"cannot read the task file {path}: {error.strerror or error}") from error
    try:
        raw = msgspec.json.decode(content) if path.suffix == ".json" else msgspec.toml.decode(content)
        return msgspec.convert(raw, Task)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, TaskError):
            raise TaskError(f"{path}: {error.__cause__}") from error
        raise ConfigError(f"{path}: {error}") from error
    except DECODE_ERRORS as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error


def split_pattern(template: Template) -> tuple[str, str]:
    """What stands before and after ``{text}``; the latter is the answer cue. Raises `TaskError`."""
    if template.pattern.count(_SLOT) != 1:
        raise TaskError(f"template {template.pattern!r} must hold {_SLOT} exactly once")
    head, cue = template.pattern.split(_SLOT)
    if not cue.strip():
        raise TaskError(f"template {template.pattern!r} needs an answer cue after {_SLOT}, like '\\nTopic:'")
    if cue != cue.rstrip():
        raise TaskError(f"template {template.pattern!r} ends with white space: put it before each label word instead")
    return head, cue


def bos_ids(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """What the model was trained to have before a text: BOS [1], or nothing [0]."""
    bare, trained = tokenizer.tokenize("x", add_bos=False), tokenizer.tokenize("x")
    return np.asarray(trained[: len(trained) - len(bare)], dtype=np.int32)


@checked
def cue_ids(tokenizer: Tokenizer, template: Template) -> NDArray[np.int32]:
    """Token ids [n] of the answer cue, the same for every text. Raises `TaskError`."""
    cue = split_pattern(template)[1]
    return _continuation(tokenizer, cue, f"the cue {cue!r}")


def head_ids(tokenizer: Tokenizer, template: Template) -> NDArray[np.int32]:
    """Token ids [n] of what stands before a text: BOS where the model was trained with it, the template's words."""
    spoken = split_pattern(template)[0].rstrip()
    if spoken:
        return np.asarray(tokenizer.tokenize(spoken), dtype=np.int32)
    return bos_ids(tokenizer)


@checked
def render_ids(
    tokenizer: Tokenizer, template: Template, text: str, max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS
) -> NDArray[np.int32]:
    """Token ids [n] of a text put to the model: head with BOS, at most ``max_text_tokens`` of the text, the cue.

    Ends with ``cue_ids(tokenizer, template)``, whatever the text.

    Raises:
        TaskError: the template cannot work.
        InputError: the text is empty or ``max_text_tokens`` < 1.
    """
    head, _ = split_pattern(template)
    text = text.strip()
    if not text:
        raise InputError("the text is empty: give at least one word")
    if max_text_tokens < 1:
        raise InputError(f"max_text_tokens must be at least 1, got {max_text_tokens}")
    spoken = head.rstrip()
    read = _readable(text)
    if spoken:
        # The head's trailing space belongs to the text's first word, as tokenizers see it.
        body = _continuation(tokenizer, head[len(spoken) :] + read, "a row's text")
    else:
        body = np.asarray(tokenizer.tokenize(head + read, add_bos=False), dtype=np.int32)
    front = head_ids(tokenizer, template)
    return np.concatenate([front, _first(body, max_text_tokens, read, text), cue_ids(tokenizer, template)])


def _readable(text: str) -> str:
    """``text``, or its beginning where it is too long to be tokenised with a template's words beside it."""
    room = MAX_TEXT_BYTES // 2
    return text if len(text.encode("utf-8", "surrogatepass")) <= room else text[: room // 4]


def _first(ids: NDArray[np.int32], n: int, read: str, text: str) -> NDArray[np.int32]:
    """The first ``n`` of ``ids``, those of ``read``. Raises `InputError` where they may not be those of ``text``."""
    if len(read) < len(text) and len(ids) < 2 * n:  # far from where it was cut, they are
        raise InputError(f"a text of {len(text)} characters is too long to find its first {n} tokens: cut it")
    return ids[:n]


@checked
def label_word_ids(tokenizer: Tokenizer, template: Template, labels: tuple[str, ...]) -> list[NDArray[np.int32]]:
    """Token ids of each label word as it continues the cue, one array per label.

    Raises:
        TaskError: not one word per label; a word that changes the cue's own tokens; a word that begins with another.
    """
    _check_words(template, labels)
    words: list[NDArray[np.int32]] = []
    for word in template.label_words:
        words.append(_after_cue(tokenizer, template, word, f"label word {word!r}"))
        for other, ids in zip(template.label_words, words[:-1], strict=False):
            n = min(len(ids), len(words[-1]))
            if np.array_equal(ids[:n], words[-1][:n]):
                raise TaskError(f"of the label words {other!r} and {word!r} one begins with the other: change one")
    return words


def target_ids(tokenizer: Tokenizer, template: Template, target: str, max_tokens: int) -> NDArray[np.int32]:
    """The first ``max_tokens`` token ids of a target text as it follows the cue, after a space.

    Raises:
        InputError: the target is empty.
        TaskError: it changes the cue's own tokens.
    """
    if not target.strip():
        raise InputError("a target text is empty: give at least one word")
    target = target.strip()
    read = _readable(target)
    ids = _after_cue(tokenizer, template, f" {read}", "a row's target text")
    return _first(ids, max_tokens, read, target)


def _after_cue(tokenizer: Tokenizer, template: Template, words: str, what: str) -> NDArray[np.int32]:
    """``what``: names ``words`` in an error, without what they say where they are of a row."""
    cue = split_pattern(template)[1]
    before = cue_ids(tokenizer, template)
    after = _continuation(tokenizer, cue + words, what)
    if len(after) <= len(before) or not np.array_equal(after[: len(before)], before):
        raise TaskError(f"{what} merges with the cue {cue!r}: start it with a space, or end the cue otherwise")
    return after[len(before) :]


def _check_words(template: Template, labels: tuple[str, ...]) -> None:
    words = template.label_words
    if len(words) != len(labels):
        raise TaskError(
            f"template {template.pattern!r} has {len(words)} label words for {len(labels)} labels: "
            f"give one each for {', '.join(labels) or 'no label'}"
        )
    for i, word in enumerate(words):
        if not word.strip():
            raise TaskError(f"template {template.pattern!r}: the label word for {labels[i]!r} is empty")
        if word in words[:i]:
            raise TaskError(f"template {template.pattern!r}: label word {word!r} stands for two labels")


def _continuation(tokenizer: Tokenizer, text: str, what: str) -> NDArray[np.int32]:
    """The ids of ``text`` as it goes on from something before it."""
    for sentinel in SENTINELS:
        alone = np.asarray(tokenizer.tokenize(sentinel, add_bos=False), dtype=np.int32)
        joined = np.asarray(tokenizer.tokenize(sentinel + text, add_bos=False), dtype=np.int32)
        if len(joined) > len(alone) and np.array_equal(joined[: len(alone)], alone):
            return joined[len(alone) :]
    raise TaskError(f"this model's tokenizer merges {what} with what stands before it: start it with a new line")
