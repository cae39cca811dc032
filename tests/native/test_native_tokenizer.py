"""Tokenisation with the model's vocabulary: nothing is lost, and BOS is added if the model uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_gguf
from tiny_case import Case

from fedbpt.errors import InputError

TEXTS = [
    "the movie was great!",
    "a",
    "bad  film,\nterrible.\t\n\n the end 2024",
    "caf\u00e9 \u4f60\u597d \U0001f600 \u0645\u0631\u062d\u0628\u0627",
    "nul \0 inside",
    " leading and trailing ",
    "word " * 5000,
]


def detokenized(case: Case, ids: np.ndarray) -> str:
    text = tiny_gguf.vocabulary(case.model).text(ids)
    puts_blank = case.model.tokenizer == "spm" and case.model.architecture != "gemma3"
    return text.removeprefix(" ") if puts_blank else text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_hold_the_whole_text(case: Case, text: str) -> None:
    ids = case.scorer.tokenize(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert detokenized(case, ids) == text


@pytest.mark.parametrize("text", ["a cut \ud83d", "\udc80", "caf\udce9", b"bytes", 7])
def test_text_that_utf8_cannot_encode_is_refused_without_quoting_it(case: Case, text: Any) -> None:
    with pytest.raises(InputError) as refused:
        case.scorer.tokenize(text)
    assert isinstance(text, int) or repr(text) not in str(refused.value)
    with pytest.raises(InputError):
        case.scorer.compile([text], [3])
    with pytest.raises(InputError):
        case.scorer.generator.chat_ids([("user", text)])


def test_every_character_of_unicode_can_be_tokenised(case: Case) -> None:
    text = "".join(chr(code) for code in [*range(0xD800), *range(0xE000, 0x110000, 61)])
    assert len(case.scorer.tokenize(text)) > 0


def test_known_words_are_one_token(case: Case) -> None:
    pieces = tiny_gguf.vocabulary(case.model).pieces
    ids = case.scorer.tokenize("x great terrible", add_bos=False)
    blank = "\u2581" if case.model.tokenizer == "spm" else "\u0120"
    assert [pieces[token] for token in ids[-2:]] == [f"{blank}great", f"{blank}terrible"]


def test_bos_comes_as_the_model_was_trained(case: Case) -> None:
    bos = tiny_gguf.vocabulary(case.model).bos
    bare = case.scorer.tokenize("good", add_bos=False)
    with_bos = case.scorer.tokenize("good", add_bos=True)
    assert bos not in bare
    assert with_bos.tolist() == [bos, *bare.tolist()]
    expected = with_bos if case.model.add_bos else bare
    np.testing.assert_array_equal(case.scorer.tokenize("good"), expected)


def test_an_empty_text_has_no_tokens_but_bos(case: Case) -> None:
    assert case.scorer.tokenize("", add_bos=False).tolist() == []
    assert case.scorer.tokenize("", add_bos=True).tolist() == [tiny_gguf.vocabulary(case.model).bos]


def test_no_end_of_sequence_is_added(case: Case) -> None:
    assert tiny_gguf.vocabulary(case.model).eos not in case.scorer.tokenize("good movie")


def test_tokens_can_be_scored(case: Case) -> None:
    ids = case.scorer.tokenize("the movie was great", add_bos=True)
    scored = case.scorer.score_with_soft_prompt([ids], case.prompts(1, 2), placement="cue")
    assert np.isfinite(scored).all()
