"""A task for a language model: templates, label words, and the token ids they become.

A text is rendered as ``head + text + cue``: the template's words before the text (after BOS, if the model was trained
with it), the first tokens of the text, and the answer cue. The cue and the label words are tokenised separately from
the text, so that the cue has the same ids for every text. They are tokenised after a neutral character, so that a
tokenizer which prepends a space to its input (SentencePiece) does not insert one in the middle.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import explain, from_builtins
from fedbpt.errors import ConfigError, InputError, TaskError
from fedbpt.protocol.specs import CheckedMessage, Generation, Template
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.quantities import PositiveInt

DEFAULT_MAX_TEXT_TOKENS = 128

MAX_TEXT_BYTES = 2**20
"""Longest text that a scorer tokenises, in bytes of UTF-8."""

_SLOT = "{text}"
SENTINELS = ("1", "x", ")")
"""Characters to tokenise a continuation after: with at least one of them, its first token does not merge."""


class Tokenizer(Protocol):
    """The part of a model that a task needs; a `fedbpt.engine.scorer.Scorer` satisfies it."""

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Return token ids [n]. ``add_bos`` None: as the model was trained."""
        ...


class Task(CheckedMessage, frozen=True):
    """A classification or text-generation task: its labels, prompt templates and data columns.

    Raises `TaskError` for a template that cannot work with any model.

    Attributes:
        templates: candidates, each with one word per label; a run selects one on training shots.
        labels: label names; empty if ``label_column`` holds target texts, whose likelihood is then tuned.
        max_text_tokens: maximum length of a text in the model's tokens.
        max_words: number of words that a text is cut to when rows are read; None: not cut.
        text_columns: names of the text column in data files; the first that a file has is read. One may combine
            several columns: ``"{premise} So: {hypothesis}"``.
        label_column: name of the column with labels or target texts.
        generation: for a task of target texts, how answers are generated and measured.
    """

    name: str
    templates: tuple[Template, ...]
    labels: tuple[str, ...] = ()
    max_text_tokens: PositiveInt = DEFAULT_MAX_TEXT_TOKENS
    max_words: PositiveInt | None = None
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    generation: Generation | UnsetType = UNSET  # left out of files that earlier versions read

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.strip():
            raise TaskError("a task needs a name", field="name")
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise TaskError(
                f"task {self.name!r} needs two or more distinct labels, or none for target texts, "
                f"got {list(self.labels)}",
                field="labels",
            )
        if not self.templates:
            raise TaskError(f"task {self.name!r} needs at least one template", field="templates")
        if not self.text_columns:
            raise TaskError(f"task {self.name!r} needs at least one text column", field="text_columns")
        if self.generation is not UNSET and self.labels:
            raise TaskError(
                f"task {self.name!r} has labels, which are scored, not generated: leave out generation, or the labels",
                field="generation",
            )
        for template in self.templates:
            split_pattern(template)
            _check_words(template, self.labels)

    @property
    def identity(self) -> TaskIdentity:
        """What all devices of a run must agree on; templates and ``max_text_tokens`` come with the run."""
        return TaskIdentity.of(self.name, self.labels, (self.text_columns, self.label_column, self.max_words))

    def clip(self, text: str) -> str:
        """Cut ``text`` after ``max_words`` words and collapse white space to single spaces."""
        return " ".join(text.split()[: self.max_words])


@checked
def load_task(path: str | Path) -> Task:
    """Read a task file: TOML, or JSON if its name ends in ``.json``.

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
        return from_builtins(raw, Task)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, TaskError):
            raise TaskError(f"{path}: {cause}", field=cause.field) from error
        raise ConfigError(f"{path}: {explain(error, Task)}") from error
    except DECODE_ERRORS as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error


def split_pattern(template: Template) -> tuple[str, str]:
    """Split a template's pattern at ``{text}`` into head and answer cue. Raises `TaskError`."""
    if template.pattern.count(_SLOT) != 1:
        raise TaskError(f"template {template.pattern!r} must hold {_SLOT} exactly once", field="pattern")
    head, cue = template.pattern.split(_SLOT)
    if not cue.strip():
        raise TaskError(
            f"template {template.pattern!r} needs an answer cue after {_SLOT}, such as '\\nTopic:'", field="pattern"
        )
    if cue != cue.rstrip():
        raise TaskError(
            f"template {template.pattern!r} ends with white space: put it before each label word instead",
            field="pattern",
        )
    return head, cue


def bos_ids(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Token ids that the model was trained to see before a text: BOS [1], or nothing [0]."""
    bare = tokenizer.tokenize("x", add_bos=False)
    trained = tokenizer.tokenize("x")
    return np.asarray(trained[: len(trained) - len(bare)], dtype=np.int32)


@checked
def cue_ids(tokenizer: Tokenizer, template: Template) -> NDArray[np.int32]:
    """Token ids [n] of the answer cue, the same for every text. Raises `TaskError`."""
    cue = split_pattern(template)[1]
    return continuation_ids(tokenizer, cue, f"the cue {cue!r}")


def head_ids(tokenizer: Tokenizer, template: Template) -> NDArray[np.int32]:
    """Token ids [n] before a text: BOS, if the model was trained with it, then the template's head."""
    head = split_pattern(template)[0].rstrip()
    if head:
        return np.asarray(tokenizer.tokenize(head), dtype=np.int32)
    return bos_ids(tokenizer)


@checked
def render_ids(
    tokenizer: Tokenizer, template: Template, text: str, max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS
) -> NDArray[np.int32]:
    """Token ids [n] of a text in its template: head with BOS, at most ``max_text_tokens`` of the text, the cue.

    Always ends with ``cue_ids(tokenizer, template)``.

    Raises:
        TaskError: the template cannot work.
        InputError: the text is empty or ``max_text_tokens`` < 1.
    """
    head, _ = split_pattern(template)
    text = text.strip()
    if not text:
        raise InputError("the text is empty: give at least one word", field="text")
    if max_text_tokens < 1:
        raise InputError(f"max_text_tokens must be at least 1, got {max_text_tokens}", field="max_text_tokens")
    stripped_head = head.rstrip()
    beginning = _beginning(text)
    if stripped_head:
        # Tokenizers attach the head's trailing space to the text's first word.
        body = continuation_ids(tokenizer, head[len(stripped_head) :] + beginning, "a row's text")
    else:
        body = np.asarray(tokenizer.tokenize(head + beginning, add_bos=False), dtype=np.int32)
    before = head_ids(tokenizer, template)
    return np.concatenate([before, _first(body, max_text_tokens, beginning, text), cue_ids(tokenizer, template)])


def _beginning(text: str) -> str:
    """``text``, cut if it is too long to be tokenised along with a template."""
    max_bytes = MAX_TEXT_BYTES // 2
    return text if len(text.encode("utf-8", "surrogatepass")) <= max_bytes else text[: max_bytes // 4]


def _first(ids: NDArray[np.int32], n: int, beginning: str, text: str) -> NDArray[np.int32]:
    """The first ``n`` tokens of ``text``, given the ``ids`` of its ``beginning``.

    Raises `InputError` if the cut may have changed them: tokens are safe only far from the cut.
    """
    if len(beginning) < len(text) and len(ids) < 2 * n:
        raise InputError(f"a text of {len(text)} characters is too long to find its first {n} tokens: shorten it")
    return ids[:n]


@checked
def label_word_ids(tokenizer: Tokenizer, template: Template, labels: tuple[str, ...]) -> list[NDArray[np.int32]]:
    """Token ids of each label word as a continuation of the cue, one array per label.

    Raises:
        TaskError: not one word per label; a word that changes the cue's own tokens; a word that is a prefix of another.
    """
    _check_words(template, labels)
    words: list[NDArray[np.int32]] = []
    for word in template.label_words:
        words.append(_after_cue(tokenizer, template, word, f"label word {word!r}"))
        for other, ids in zip(template.label_words, words[:-1], strict=False):
            n = min(len(ids), len(words[-1]))
            if np.array_equal(ids[:n], words[-1][:n]):
                raise TaskError(
                    f"of the label words {other!r} and {word!r} one begins with the other: change one",
                    field="label_words",
                )
    return words


def target_ids(tokenizer: Tokenizer, template: Template, target: str, max_tokens: int) -> NDArray[np.int32]:
    """The first ``max_tokens`` token ids of a target text as a continuation of the cue, after a space.

    Raises:
        InputError: the target is empty.
        TaskError: it changes the cue's own tokens.
    """
    if not target.strip():
        raise InputError("a target text is empty: give at least one word")
    target = target.strip()
    beginning = _beginning(target)
    ids = _after_cue(tokenizer, template, f" {beginning}", "a row's target text")
    return _first(ids, max_tokens, beginning, target)


def _after_cue(tokenizer: Tokenizer, template: Template, words: str, what: str) -> NDArray[np.int32]:
    """Token ids of ``words`` after the cue. ``what`` names them in an error, which must not quote a row."""
    cue = split_pattern(template)[1]
    before = cue_ids(tokenizer, template)
    after = continuation_ids(tokenizer, cue + words, what)
    if len(after) <= len(before) or not np.array_equal(after[: len(before)], before):
        raise TaskError(f"{what} merges with the cue {cue!r}: start it with a space, or change the end of the cue")
    return after[len(before) :]


def _check_words(template: Template, labels: tuple[str, ...]) -> None:
    words = template.label_words
    if len(words) != len(labels):
        remedy = f"give one each for {', '.join(labels)}" if labels else "leave label_words empty"
        raise TaskError(
            f"template {template.pattern!r} has {len(words)} label words for {len(labels)} labels: {remedy}",
            field="label_words",
        )
    for i, word in enumerate(words):
        if not word.strip():
            raise TaskError(
                f"template {template.pattern!r} needs a label word for {labels[i]!r}, got an empty one",
                field="label_words",
            )
        if word in words[:i]:
            raise TaskError(
                f"template {template.pattern!r} has label word {word!r} for two labels: give each label its own",
                field="label_words",
            )


def continuation_ids(tokenizer: Tokenizer, text: str, what: str) -> NDArray[np.int32]:
    """Token ids of ``text`` when it continues other text. Raises `TaskError` if it merges with every sentinel."""
    for sentinel in SENTINELS:
        before = np.asarray(tokenizer.tokenize(sentinel, add_bos=False), dtype=np.int32)
        joined = np.asarray(tokenizer.tokenize(sentinel + text, add_bos=False), dtype=np.int32)
        if len(joined) > len(before) and np.array_equal(joined[: len(before)], before):
            return joined[len(before) :]
    raise TaskError(f"this model's tokenizer merges {what} with the text before it: start it with a new line")
