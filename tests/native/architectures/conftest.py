"""Fixtures: one tiny model per architecture, built in transformers, written and loaded once per session."""

from __future__ import annotations

from collections.abc import Callable

import conversion
import pytest
from hugging_face import ArchitectureCase, HuggingFace
from long_rope import ARCHITECTURES as LONG_ROPE
from table import ARCHITECTURES
from tiny_case import Case


@pytest.fixture(scope="session")
def architecture_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """``architecture_case(name, weights="f32")``: the case of an architecture in the table, loaded once."""
    folder = tmp_path_factory.mktemp("architectures")
    every = {**ARCHITECTURES, **{architecture.name: architecture for architecture in LONG_ROPE}}
    references: dict[str, HuggingFace] = {}
    made: dict[tuple[str, str], Case] = {}

    def get(name: str, weights: conversion.Weights = "f32") -> Case:
        architecture = every[name]
        if name not in references:
            references[name] = HuggingFace(architecture)
        if (name, weights) not in made:
            path = folder / f"{len(made)}-{weights}.gguf"
            conversion.write(path, architecture, references[name].model, weights)
            made[name, weights] = ArchitectureCase(architecture, path, references[name], weights)
        return made[name, weights]

    return get


@pytest.fixture(params=list(ARCHITECTURES))
def case(request: pytest.FixtureRequest, architecture_case: Callable[..., Case]) -> Case:
    """Each architecture with float32 weights."""
    return architecture_case(request.param)
