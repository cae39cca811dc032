"""Templates and label words as token ids, with tokenizers like the two families in use."""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt import tasks
from fedbpt.errors import ConfigError, InputError, TaskError
from fedbpt.protocol.specs import Template
from fedbpt.tasks.task import (
    MAX_TEXT_BYTES,
    Generation,
    Task,
    cue_ids,
    label_word_ids,
    load_task,
    render_ids,
    target_ids,
)
from tests.support.raises import raises


class WordTokenizer:
    """Splits like a byte-level BPE: a word includes its leading space. ``spm``: prepends a space, like Llama 2."""

    def __init__(self, bos: bool, spm: bool = False) -> None:
        self.bos, self.spm = bos, spm
        self.vocabulary: dict[str, int] = {"<s>": 0}

    def tokenize(self, text: str, add_bos: bool | None = None) -> np.ndarray:
        pieces = re.findall(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s", f" {text}" if self.spm and text else text)
        if self.bos if add_bos is None else add_bos:
            pieces.insert(0, "<s>")
        return np.array([self.vocabulary.setdefault(p, len(self.vocabulary)) for p in pieces], dtype=np.int32)

    def words(self, ids: np.ndarray) -> list[str]:
        names = {index: piece for piece, index in self.vocabulary.items()}
        return [names[int(i)] for i in ids]


TOKENIZERS = [WordTokenizer(bos=False), WordTokenizer(bos=True), WordTokenizer(bos=True, spm=True)]
TOPIC = Template(pattern="{text}\nTopic:", label_words=(" World", " Sports"))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", [t for task in tasks.BUILTIN.values() for t in task.templates])
@settings(max_examples=20, deadline=None)
@given(text=st.text(min_size=1).filter(str.strip))
def test_every_rendered_text_ends_with_the_cue(tokenizer, template, text):
    cue = cue_ids(tokenizer, template)
    rendered = render_ids(tokenizer, template, text)
    assert len(cue) > 0
    np.testing.assert_array_equal(rendered[-len(cue) :], cue)


def test_the_cue_gets_no_space_from_a_sentencepiece_tokenizer():
    tokenizer = WordTokenizer(bos=True, spm=True)
    assert tokenizer.words(cue_ids(tokenizer, TOPIC)) == ["\n", "Topic", ":"]


def test_bos_comes_first_where_the_model_was_trained_with_it():
    for bos, first in ((True, "<s>"), (False, "a")):
        tokenizer = WordTokenizer(bos)
        assert tokenizer.words(render_ids(tokenizer, TOPIC, "a b"))[0] == first


def test_a_long_text_is_cut_and_the_template_is_not():
    tokenizer = WordTokenizer(bos=True)
    template = Template(pattern="Review: {text} It was", label_words=(" bad", " good"))
    rendered = tokenizer.words(render_ids(tokenizer, template, "one two three four", max_text_tokens=2))
    assert rendered == ["<s>", "Review", ":", " one", " two", " It", " was"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_label_words_are_the_tokens_after_the_cue(tokenizer):
    template = Template(pattern="{text}\nTopic:", label_words=(" World", " sci tech"))
    found = [tokenizer.words(ids) for ids in label_word_ids(tokenizer, template, ("w", "s"))]
    assert found == [[" World"], [" sci", " tech"]]


def test_an_empty_text_is_refused():
    with raises(InputError, field="text"):
        render_ids(TOKENIZERS[0], TOPIC, " \n")


def test_words_may_share_a_first_token():
    template = Template(pattern="{text}\nTopic:", label_words=(" sci fi", " sci tech"))
    assert [len(ids) for ids in label_word_ids(TOKENIZERS[0], template, ("a", "b"))] == [2, 2]


@pytest.mark.parametrize("words", [(" sci", " sci tech"), (" sci tech", " sci")])
def test_a_word_that_begins_with_another_is_named(words):
    template = Template(pattern="{text}\nTopic:", label_words=words)
    with raises(TaskError, field="label_words") as caught:
        label_word_ids(TOKENIZERS[0], template, ("a", "b"))
    assert f"{words[0]!r} and {words[1]!r}" in str(caught.value)


def test_a_word_that_merges_with_the_cue_is_named():
    template = Template(pattern="{text} It", label_words=("self", " is"))
    with raises(TaskError) as caught:
        label_word_ids(TOKENIZERS[0], template, ("a", "b"))
    assert "'self'" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "words", "field"),
    [
        ("Topic:", (" a", " b"), "pattern"),
        ("{text} {text}:", (" a", " b"), "pattern"),
        ("Topic: {text}", (" a", " b"), "pattern"),
        ("{text}\nTopic: ", ("a", "b"), "pattern"),
        ("{text}\nTopic:", (" a",), "label_words"),
        ("{text}\nTopic:", (" a", " a"), "label_words"),
        ("{text}\nTopic:", (" a", " "), "label_words"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_once(pattern, words, field):
    with raises(TaskError, field=field):
        Task(name="t", labels=("x", "y"), templates=(Template(pattern=pattern, label_words=words),))


@pytest.mark.parametrize("change", [{"name": " "}, {"labels": ("x", "x")}, {"templates": ()}, {"text_columns": ()}])
def test_an_incomplete_task_is_refused(change):
    (field,) = change
    with raises(TaskError, field=field):
        Task(**{"name": "t", "labels": ("World", "Sports"), "templates": (TOPIC,), **change})


def test_clip_cuts_after_the_word_limit():
    task = Task(name="t", labels=("a", "b"), templates=(TOPIC,), max_words=2)
    assert task.clip(" one\n two  three") == "one two"


TOML = """
name = "tickets"
labels = ["billing", "technical"]
max_text_tokens = 64
[[templates]]
pattern = "{text}\\nDepartment:"
label_words = [" billing", " technical"]
"""
JSON = '{"name": "j", "labels": ["a", "b"], "templates": [{"pattern": "{text}\\nT:", "label_words": [" a", " b"]}]}'


def test_a_task_file_is_read_from_toml_and_json(tmp_path: Path):
    (tmp_path / "t.toml").write_text(TOML)
    (tmp_path / "t.json").write_text(JSON)
    assert tasks.load(tmp_path / "t.toml").templates[0].pattern == "{text}\nDepartment:"
    assert tasks.load(str(tmp_path / "t.json")).labels == ("a", "b")


@pytest.mark.parametrize(
    ("content", "error", "pattern"),
    [
        (TOML + "= 3", ConfigError, r"t\.toml .*TOML"),
        (TOML.replace("max_text_tokens", "max_tokens"), ConfigError, "max_tokens"),
        (TOML.replace("64", "0"), ConfigError, ">= 1"),
        (TOML.replace('name = "tickets"', ""), ConfigError, "`name`"),
        (TOML.replace('" technical"]', "]"), TaskError, r"t\.toml: template .* billing, technical"),
    ],
)
def test_a_bad_task_file_says_what_is_wrong(tmp_path: Path, content, error, pattern):
    (tmp_path / "t.toml").write_text(content)
    with pytest.raises(error, match=pattern):
        load_task(tmp_path / "t.toml")


def test_a_missing_task_file_and_an_unknown_task_are_different_errors(tmp_path: Path):
    with raises(ConfigError) as missing:
        tasks.load(tmp_path / "none.toml")
    assert "none.toml: No such file" in str(missing.value)
    with raises(ConfigError) as unknown:
        tasks.load("agnews")
    assert "ag-news, sst-2, bbc-news" in str(unknown.value)


def test_builtin_tasks_have_three_to_five_candidate_templates():
    assert set(tasks.BUILTIN) == {"ag-news", "sst-2", "bbc-news"}
    for name, task in tasks.BUILTIN.items():
        assert tasks.load(name) is task
        assert 3 <= len(task.templates) <= 5
        for tokenizer in TOKENIZERS:
            for template in task.templates:
                assert len(label_word_ids(tokenizer, template, task.labels)) == len(task.labels)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_text_too_long_to_tokenise_begins_with_its_own_tokens(tokenizer):
    text, template = "cat dog " * (MAX_TEXT_BYTES // 4), Template(pattern="Read: {text}\nTopic:", label_words=())
    assert np.array_equal(render_ids(tokenizer, template, text, 9), render_ids(tokenizer, template, text[:200], 9))
    targets = Template(pattern="{text}\nTopic:", label_words=())
    assert np.array_equal(target_ids(tokenizer, targets, text, 9), target_ids(tokenizer, targets, text[:200], 9))


def test_a_text_of_one_endless_word_is_refused_by_its_length():
    tokenizer, template, text = WordTokenizer(bos=True), TOPIC, "\u00e9a" + "a" * MAX_TEXT_BYTES
    with pytest.raises(InputError, match=str(len(text))):
        render_ids(tokenizer, template, text)
    with pytest.raises(InputError, match=str(len(text))):
        target_ids(tokenizer, template, text, 9)


def test_a_task_of_target_texts_says_how_answers_are_generated(tmp_path):
    path = tmp_path / "t.toml"
    text = 'name = "t"\n[[templates]]\npattern = "{text}\\nA:"\nlabel_words = []\n'
    path.write_text(text + '[generation]\nmetric = "rouge-l"\nmax_tokens = 9\nstop = ["\\n", "###"]\n')
    assert tasks.load(path).generation == Generation(metric="rouge-l", max_tokens=9, stop=("\n", "###"))
    path.write_text(text + "[generation]\nmax_tokens = 0\n")
    with raises(ConfigError):
        tasks.load(path)
    path.write_text(text + '[generation]\nstop = [""]\n')
    with raises(TaskError, field="stop"):
        tasks.load(path)


def test_a_task_with_labels_generates_nothing():
    with raises(TaskError, field="generation"):
        msgspec.structs.replace(tasks.BUILTIN["ag-news"], generation=Generation())


def test_a_task_without_generation_is_written_as_earlier_versions_read_it():
    assert "generation" not in msgspec.to_builtins(tasks.BUILTIN["ag-news"])
