"""Arguments that the scorer accepts and refuses: invalid ones are an `InputError` of one line, never a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_case import Case

import fedbpt
from fedbpt.errors import InputError

N_PROMPT = 3


def arguments(case: Case) -> dict[str, Any]:
    """Arguments of a valid call."""
    return {
        "tokens": case.texts([6, 30, 4]),
        "embeds": case.prompts(2, N_PROMPT),
        "label_ids": np.array([5, 300], np.int32),
        "prefix": np.array([1, 44], np.int32),
    }


def spoilt(values: np.ndarray, value: float) -> np.ndarray:
    result = values.copy()
    result[-1, -1, -1] = value
    return result


BAD: dict[str, Callable[[Case], dict[str, Any]]] = {
    "no texts": lambda _: {"tokens": []},
    "an empty text": lambda case: {"tokens": [case.ids(4), case.ids(0)]},
    "an empty text after a soft prompt": lambda case: {"tokens": [case.ids(0)], "placement": "front"},
    "one flat text instead of a list of texts": lambda case: {"tokens": case.ids(9)},
    "a text of rank two": lambda case: {"tokens": [case.ids(8).reshape(2, 4)]},
    "a text of fractions": lambda _: {"tokens": [np.array([4.5, 6.0])]},
    "a text longer than the context": lambda case: {
        "tokens": [case.ids(case.model.n_ctx + 1)],
        "prefix": None,
        "embeds": case.prompts(1, 0),
    },
    "prompt and text together longer than the context": lambda case: {
        "tokens": [case.ids(4), case.ids(case.model.n_ctx - N_PROMPT + 1)],
        "prefix": None,
    },
    "prefix, prompt and text together longer than the context": lambda case: {
        "tokens": [case.ids(case.model.n_ctx - N_PROMPT - 1)]
    },
    "prefix and text with a cue longer than the context": lambda case: {
        "tokens": [case.ids(case.model.n_ctx - 1)],
        "placement": "cue",
    },
    "a prefix longer than the context": lambda case: {"prefix": case.ids(case.model.n_ctx)},
    "a token id that equals n_vocab": lambda case: {"tokens": [np.array([4, case.model.n_vocab])]},
    "a token id far outside": lambda _: {"tokens": [np.array([4, 2**40])]},
    "a negative token id": lambda _: {"tokens": [np.array([4, -1])]},
    "a prefix id outside the vocabulary": lambda case: {"prefix": [case.model.n_vocab]},
    "a negative prefix id": lambda _: {"prefix": [-1]},
    "a label id outside the vocabulary": lambda case: {"label_ids": [3, case.model.n_vocab]},
    "a negative label id": lambda _: {"label_ids": [-1]},
    "no labels": lambda _: {"label_ids": []},
    "labels of rank two": lambda _: {"label_ids": [[3, 4]]},
    "rows that are too narrow": lambda case: {"embeds": case.prompts(2, N_PROMPT)[:, :, :-1]},
    "rows that are too wide": lambda case: {"embeds": np.zeros((2, 3, case.model.n_embd + 1), np.float32)},
    "no candidates": lambda case: {"embeds": case.prompts(2, N_PROMPT)[:0]},
    "embeds of rank one": lambda case: {"embeds": case.prompts(1, 1)[0, 0]},
    "embeds of rank four": lambda case: {"embeds": case.prompts(1, 1)[None]},
    "embeds with NaN": lambda case: {"embeds": spoilt(case.prompts(2, N_PROMPT), np.nan)},
    "embeds with infinity": lambda case: {"embeds": spoilt(case.prompts(2, N_PROMPT), np.inf)},
    "embeds with minus infinity": lambda case: {"embeds": spoilt(case.prompts(2, N_PROMPT), -np.inf)},
    "embeds beyond float32": lambda case: {"embeds": spoilt(case.prompts(2, N_PROMPT).astype(np.float64), 1e300)},
    "complex embeds": lambda case: {"embeds": case.prompts(2, N_PROMPT).astype(np.complex64)},
    "a cue longer than a text": lambda case: {"tokens": [case.ids(9), case.ids(2)], "placement": "cue"},
    "an unknown placement": lambda _: {"placement": "behind"},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_line(llama: Case, what: str) -> None:
    good = llama.scorer.score_with_soft_prompt(**arguments(llama))
    with pytest.raises(InputError) as refused:
        llama.scorer.score_with_soft_prompt(**(arguments(llama) | BAD[what](llama)))
    assert isinstance(refused.value, ValueError)
    assert len(str(refused.value).splitlines()) == 1
    np.testing.assert_array_equal(llama.scorer.score_with_soft_prompt(**arguments(llama)), good)


def test_a_refused_text_is_named_by_its_place(llama: Case) -> None:
    texts = [llama.ids(4), llama.ids(5), llama.ids(0)]
    with pytest.raises(InputError, match=r"\b2\b"):
        llama.scorer.score_with_soft_prompt(texts, llama.prompts(1, 1))


def test_a_wrong_width_is_refused_with_both_widths(llama: Case) -> None:
    with pytest.raises(InputError) as refused:
        llama.scorer.score_with_soft_prompt([llama.ids(4)], np.zeros((1, 1, 63), np.float32))
    assert "63" in str(refused.value)
    assert "64" in str(refused.value)


def test_too_long_a_text_is_refused_with_the_limit(llama: Case) -> None:
    with pytest.raises(InputError, match=str(llama.model.n_ctx)):
        llama.scorer.score_with_soft_prompt([llama.ids(700)], llama.prompts(1, 1))


@pytest.mark.parametrize("ids", [[416], [-1], [4, 2**40], [1.5], [[3, 4]]])
def test_embeddings_of_bad_ids_are_refused(llama: Case, ids: Any) -> None:
    with pytest.raises(InputError):
        llama.scorer.token_embeddings(ids)


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_the_callers_arrays_stay_as_they_are(llama: Case, placement: str) -> None:
    given = arguments(llama)
    arrays = [*given["tokens"], given["embeds"], given["label_ids"], given["prefix"]]
    copies = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    llama.scorer.score_with_soft_prompt(**given, placement=placement)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_the_result_is_the_callers_own(llama: Case) -> None:
    first = llama.scorer.score_with_soft_prompt(**arguments(llama))
    kept = first.copy()
    llama.scorer.score_with_soft_prompt(**(arguments(llama) | {"embeds": llama.prompts(2, N_PROMPT, seed=1)}))
    np.testing.assert_array_equal(first, kept)
    first[:] = 0  # writeable
    np.testing.assert_array_equal(llama.scorer.score_with_soft_prompt(**arguments(llama)), kept)


def test_lists_strides_and_other_number_types_are_accepted(llama: Case) -> None:
    given = arguments(llama)
    expected = llama.scorer.score_with_soft_prompt(**given)
    strided = np.repeat(given["embeds"].astype(np.float64), 2, axis=2)[:, :, ::2]
    other = {
        "tokens": [
            given["tokens"][0].tolist(),
            tuple(given["tokens"][1].tolist()),
            given["tokens"][2].astype(np.int64),
        ],
        "embeds": strided,
        "label_ids": given["label_ids"].astype(np.uint16),
        "prefix": given["prefix"].tolist(),
    }
    np.testing.assert_array_equal(llama.scorer.score_with_soft_prompt(**other), expected)
    fortran = arguments(llama) | {"embeds": np.asfortranarray(given["embeds"])}
    np.testing.assert_array_equal(llama.scorer.score_with_soft_prompt(**fortran), expected)


@pytest.mark.parametrize("n_text", range(244, 254))
def test_there_is_room_for_a_batchs_padding(llama: Case, n_text: int) -> None:
    """Around 256 tokens, the unit that the KV cache grows by, with a prefix that is not a multiple of 4."""
    scorer = fedbpt.load_model(llama.path, n_threads=1)
    text, prefix = llama.texts([n_text]), llama.ids(2)
    logits = scorer.score_with_soft_prompt(text, llama.prompts(1, 2), [5], prefix=prefix)
    assert np.isfinite(logits).all()
