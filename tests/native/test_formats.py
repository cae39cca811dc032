"""The storage formats of a model's weights, and this CPU's speed with each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_gguf
from tiny_case import Case

import fedbpt
from fedbpt import models
from fedbpt.errors import InputError, ModelFileError

BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_1": 20 / 32}


@pytest.mark.parametrize("weights", list(BYTES))
def test_weight_formats_count_the_matrices_of_the_layers(
    case_of: Callable[..., Case], weights: tiny_gguf.Weights
) -> None:
    case = case_of("llama", weights)
    matrices = [v for name, v in tiny_gguf.tensors(case.model).items() if name.startswith("blk.") and v.ndim == 2]
    n_params = sum(values.size for values in matrices)
    assert case.scorer.weight_formats == ((weights, n_params, int(n_params * BYTES[weights])),)


def test_weight_formats_put_the_most_used_first(case_of: Callable[..., Case], tmp_path: Path) -> None:
    mixed = models.requantize(case_of("llama").path, "q4_k_m", tmp_path / "mixed.gguf", n_threads=1)
    found = models.weight_formats(mixed.path)
    assert len(found) > 1
    assert [part.n_params for part in found] == sorted((part.n_params for part in found), reverse=True)


def test_weight_formats_of_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"page\.gguf"):
        models.weight_formats(tiny_gguf.write_not_gguf(tmp_path / "page.gguf"))


def test_tensor_shapes_are_those_of_every_tensor_inputs_first(case_of: Callable[..., Case]) -> None:
    case = case_of("llama", "q8_0")
    expected = {name: values.shape[::-1] for name, values in tiny_gguf.tensors(case.model).items()}
    assert models.tensor_shapes(case.path) == expected


def test_tensor_shapes_of_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"page\.gguf"):
        models.tensor_shapes(tiny_gguf.write_not_gguf(tmp_path / "page.gguf"))


def test_every_weight_type_has_a_kernel_to_measure() -> None:
    types = ["f32", "f16", "bf16", "q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "q4_1", "q4_0", "iq4_nl", "iq4_xs"]
    types += ["q3_K", "q2_K", "iq2_xs"]
    found = models.matmul_flops(types)
    assert list(found) == types
    assert min(found.values()) > 0


@pytest.mark.parametrize("type", ["i32", "q8_1", "q8_K", "q4_k_m", "Q4_0", ""])
def test_an_unknown_weight_type_is_refused_by_its_name(type: str) -> None:
    with pytest.raises(InputError, match=f"'{type}'"):
        models.matmul_flops([type])


def test_a_tiny_model_gets_no_hint(llama: Case) -> None:
    assert llama.scorer.hint is None


def test_the_hint_names_the_models_formats_and_the_name_it_was_loaded_by(
    llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "faster_format", lambda name, weights: f"{name}: {weights[0].type}")
    assert fedbpt.load_model(str(llama.path), n_threads=1).hint == f"{llama.path}: f32"
