"""The scorer's methods with any value for any argument give a result, or a fedbpt error that names the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.any_value import VALUES, fault_of
from tiny_case import Case

import fedbpt
from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.engine.text_generator import Placed, Sampling

SLOW = {("load_model", "n_threads"), ("NativeScorer", "n_threads")}
"""Arguments left out: large values start more threads than a machine may have."""


def calls(case: Case) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    scorer = fedbpt.load_model(case.path)
    embeds = np.zeros((1, 1, scorer.n_embd), dtype=np.float32)
    plan = scorer.compile([[1, 2, 3]], [1, 2], "cue")
    return {
        "load_model": (fedbpt.load_model, {"name_or_path": case.path}),
        "NativeScorer": (NativeScorer, {"path": case.path}),
        "tokenize": (scorer.tokenize, {"text": "a text"}),
        "token_embeddings": (scorer.token_embeddings, {"ids": [1, 2]}),
        "compile": (scorer.compile, {"texts": [[1, 2, 3]]}),
        "score_with_soft_prompt": (scorer.score_with_soft_prompt, {"tokens": [[1, 2, 3]], "embeds": embeds}),
        "score": (plan.score, {"embeds": embeds}),
        "open": (scorer.generator.open, {"placed": Placed(np.array([1, 2], dtype=np.int32)), "sampling": Sampling()}),
        "text_ids": (scorer.generator.text_ids, {"text": "a text"}),
        "chat_ids": (scorer.generator.chat_ids, {"messages": [("user", "hi")]}),
        "piece": (scorer.generator.piece, {"token": 1}),
        "is_end": (scorer.generator.is_end, {"token": 1}),
        "weight_formats": (fedbpt.models.weight_formats, {"path": case.path}),
        "model_parts": (fedbpt.models.model_parts, {"path": case.path}),
    }


NAMES = (
    *("load_model", "NativeScorer", "tokenize", "token_embeddings", "compile", "score_with_soft_prompt", "score"),
    *("open", "text_ids", "chat_ids", "piece", "is_end", "weight_formats", "model_parts"),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_used_or_refused_by_its_name(
    name: str, llama: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    call, right = calls(llama)[name]
    faults = []
    for parameter in inspect.signature(call).parameters:
        if (name, parameter) not in SLOW:
            found = [fault_of(call, right, parameter, value) for value in VALUES]
            faults += [f"{parameter}: {fault}" for fault in found if fault is not None]
    assert "\n".join(faults) == ""
