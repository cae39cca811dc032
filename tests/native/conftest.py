"""Fixtures: tiny models, each written and loaded once per session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny_gguf
from tiny_case import Case


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """``case_of(name, weights="f32")``: the case of a model in `tiny_gguf.MODELS`, loaded once."""
    folder = tmp_path_factory.mktemp("tiny-models")
    made: dict[tuple[str, str], Case] = {}

    def get(name: str, weights: tiny_gguf.Weights = "f32") -> Case:
        if (name, weights) not in made:
            model = replace(tiny_gguf.MODELS[name], weights=weights)
            path = tiny_gguf.write(folder / f"{name}-{weights}.gguf", model)
            made[name, weights] = Case(model, path)
        return made[name, weights]

    return get


@pytest.fixture(scope="session", params=list(tiny_gguf.MODELS))
def case(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """Each tiny model with float32 weights."""
    return case_of(request.param)


@pytest.fixture(scope="session")
def llama(case_of: Callable[..., Case]) -> Case:
    """Only the llama, for behaviour that does not depend on the architecture."""
    return case_of("llama")


@pytest.fixture(scope="session", params=["llama-f32", "llama-q8_0", "llama-q4_1", "gemma3-f32", "gemma3-q8_0"])
def repeatable(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """Models for bit-for-bit tests: quantised weights round activations, so that any change of batch shape shows."""
    name, weights = request.param.split("-")
    return case_of(name, weights)
