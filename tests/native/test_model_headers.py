"""Models that are refused by their headers, before any weight is loaded."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_gguf
from gguf_bytes import ARRAY, STRING, Gguf, Setting, read

from fedbpt import _native
from fedbpt.errors import ModelError, ModelFileError, UnsupportedModelError

U32, I32, F32, BOOL = 4, 5, 6, 7
Edit = Callable[[Gguf], None]


@pytest.fixture(scope="session")
def llama_parts(tmp_path_factory: pytest.TempPathFactory) -> Gguf:
    """The smallest llama, parsed."""
    path = tmp_path_factory.mktemp("headers") / "llama.gguf"
    return read(tiny_gguf.write(path, tiny_gguf.SMALLEST).read_bytes())


def setting(key: str, value: Any, type: int = U32, item: int = 0) -> Edit:
    """Set or replace a key."""

    def edit(model: Gguf) -> None:
        model.settings = [each for each in model.settings if each.key != key.encode()]
        model.settings.append(Setting(key.encode(), type, value, item))

    return edit


def refused(model: Gguf, folder: Path, edit: Edit, *, loadable: bool = False) -> ModelError:
    """The error of loading an edited model.

    Unless ``loadable``, a tensor is missing too: the error must be about the header, which is checked first.
    """
    model = copy.deepcopy(model)
    if not loadable:
        model.tensors[1].name = b"blk.0.other.weight"
    edit(model)
    path = folder / "edited.gguf"
    path.write_bytes(model.write())
    with pytest.raises(ModelError) as failed:
        _native.Engine(str(path).encode(), 1, 0, "", False)
    message = str(failed.value)
    assert message.splitlines() == [message]
    assert "edited.gguf" in message
    assert "blk.0.attn_norm" not in message
    return failed.value


def test_the_unedited_model_loads(llama_parts: Gguf, tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    path.write_bytes(llama_parts.write())
    assert _native.Engine(str(path).encode(), 1, 0, "", False).architecture == "llama"


ENCODERS = (
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding llama-embed"
)
RECURRENT = "mamba mamba2 rwkv6 rwkv7 jamba falcon-h1 granitehybrid lfm2 nemotron_h qwen3next qwen35 kimi-linear"
OTHERS = "t5 t5encoder dream llada llada-moe rnd1 clip wavtokenizer-dec gemma3n gemma4 deepseek4 eagle3 no-such-thing"


@pytest.mark.parametrize("architecture", [*ENCODERS.split(), *RECURRENT.split(), *OTHERS.split()])
def test_other_models_than_causal_decoders_are_refused_by_name(
    llama_parts: Gguf, tmp_path: Path, architecture: str
) -> None:
    edit = setting("general.architecture", architecture.encode(), STRING)
    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, UnsupportedModelError)
    assert f"'{architecture}'" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "type"),
    [
        ("llama.attention.causal", 0, BOOL),
        ("llama.pooling_type", 1, U32),
        ("llama.pooling_type", 3, U32),
        ("llama.rope.scaling.type", b"su", STRING),
        ("tokenizer.ggml.model", b"none", STRING),
        ("tokenizer.ggml.model", b"no_vocab", STRING),
        ("general.type", b"adapter", STRING),
        ("general.type", b"mmproj", STRING),
    ],
)
def test_a_model_for_another_purpose_is_refused_with_the_key_that_says_so(
    llama_parts: Gguf, tmp_path: Path, key: str, value: Any, type: int
) -> None:
    error = refused(llama_parts, tmp_path, setting(key, value, type))
    assert isinstance(error, UnsupportedModelError)
    assert key.removeprefix("llama.") in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("block_count", value) for value in (0, 513, 2**32 - 1)],
        *[("context_length", value) for value in (0, 1, 2**31, 2**32 - 1)],
        ("embedding_length", 0),
        *[("attention.head_count", value) for value in (0, 3)],
        *[("attention.head_count_kv", value) for value in (0, 3)],
        *[("rope.dimension_count", value) for value in (0, 1, 15, 64, 2**32 - 1)],
        ("attention.key_length", 0),
        ("attention.value_length", 0),
        *[("attention.sliding_window", value) for value in (2**30, 2**32 - 1)],
        *[("attention.layer_norm_rms_epsilon", value) for value in (math.nan, -1e-5, 0.0, math.inf)],
        *[("rope.freq_base", value) for value in (math.nan, 0.0, -1.0, math.inf)],
        *[("rope.scaling.factor", value) for value in (math.nan, -1.0, math.inf)],
        ("attention.clamp_kqv", math.nan),
        ("nextn_predict_layers", 1),
        ("expert_used_count", 2),
    ],
)
def test_an_invalid_setting_is_named_by_its_key_or_value(
    llama_parts: Gguf, tmp_path: Path, key: str, value: float
) -> None:
    edit = setting(f"llama.{key}", value, F32 if isinstance(value, float) else U32)
    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert key in str(error) or f" {value} " in str(error)


@pytest.mark.parametrize(
    "counts",
    [
        {"expert_count": 4},
        {"expert_count": 4, "expert_used_count": 5},
        {"expert_count": 2000, "expert_used_count": 2},
        {"expert_count": 4, "expert_used_count": 2, "expert_group_count": 3, "expert_group_used_count": 1},
        {"expert_count": 4, "expert_used_count": 2, "expert_group_count": 2, "expert_group_used_count": 2},
        {"expert_count": 4, "expert_used_count": 2, "expert_group_count": 4, "expert_group_used_count": 0},
    ],
)
def test_inconsistent_numbers_of_experts_are_refused(llama_parts: Gguf, tmp_path: Path, counts: dict[str, int]) -> None:
    def edit(model: Gguf) -> None:
        for key, value in counts.items():
            setting(f"llama.{key}", value)(model)

    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert f" {counts['expert_count']} " in str(error)


def twice(model: Gguf) -> None:
    tokens = model.find("tokenizer.ggml.tokens").value
    tokens[300] = tokens[301]


def fewer_tokens(model: Gguf) -> None:
    for key in ("tokens", "scores", "token_type"):
        del model.find(f"tokenizer.ggml.{key}").value[-1]


def cut(key: str) -> Edit:
    def edit(model: Gguf) -> None:
        del model.find(key).value[10:]

    return edit


@pytest.mark.parametrize(
    ("edit", "value"),
    [
        (twice, ""),
        (cut("tokenizer.ggml.scores"), "tokenizer.ggml.scores"),
        (cut("tokenizer.ggml.token_type"), "tokenizer.ggml.token_type"),
        (fewer_tokens, "415"),
        (setting("tokenizer.ggml.tokens", [], ARRAY, STRING), ""),
        (setting("tokenizer.ggml.tokens", [1, 2], ARRAY, I32), "tokenizer.ggml.tokens"),
    ],
)
def test_an_inconsistent_vocabulary_is_refused(llama_parts: Gguf, tmp_path: Path, edit: Edit, value: str) -> None:
    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert value in str(error)


@pytest.mark.parametrize("type", [gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.I8])
def test_weights_of_integers_are_refused(llama_parts: Gguf, tmp_path: Path, type: gguf.GGMLQuantizationType) -> None:
    def edit(model: Gguf) -> None:
        model.tensors[-1].type = int(type)

    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert llama_parts.tensors[-1].name.decode() in str(error)


def test_a_file_without_weights_is_refused(llama_parts: Gguf, tmp_path: Path) -> None:
    def edit(model: Gguf) -> None:
        model.tensors, model.data = [], b""

    assert isinstance(refused(llama_parts, tmp_path, edit), UnsupportedModelError)


def test_a_truncated_file_is_refused_with_its_size(llama_parts: Gguf, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    whole = llama_parts.write()
    path.write_bytes(whole[:-100_000])
    with pytest.raises(ModelFileError) as failed:
        _native.Engine(str(path).encode(), 1, 0, "", False)
    assert str(len(whole) - 100_000) in str(failed.value)


@pytest.mark.parametrize(
    ("edit", "reason", "needs_newer_fedbpt"),
    [
        (setting("tokenizer.ggml.model", b"newest", STRING), "newest", True),
        (lambda model: setattr(model.tensors[3], "name", b"blk.0.attn_k_new"), "attn_k", True),
        (setting("llama.feed_forward_length", 48), "wrong shape", True),
        (setting("llama.context_length", 512.0, F32), "llama.context_length", True),
        (lambda model: setattr(model, "version", 4), "version 4", True),
        (lambda model: setattr(model, "version", 1), "GGUFv1", False),
        (lambda model: setattr(model, "version", struct.unpack(">I", b"\3\0\0\0")[0]), "endian", False),
    ],
)
def test_a_failure_is_reported_with_llama_cpps_first_reason_and_fitting_advice(
    llama_parts: Gguf, tmp_path: Path, edit: Edit, reason: str, needs_newer_fedbpt: bool
) -> None:
    """``reason`` is in the words of llama.cpp."""
    error = refused(llama_parts, tmp_path, edit, loadable=True)
    assert reason in str(error)
    assert ("fedbpt" in str(error)) == needs_newer_fedbpt
    assert "(failed to load model)" not in str(error)


def test_an_unknown_pre_tokenizer_needs_a_newer_fedbpt(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    model = tiny_gguf.LLAMA_BPE
    parts = read(tiny_gguf.write(path, model).read_bytes())
    error = refused(parts, tmp_path, setting("tokenizer.ggml.pre", b"from-tomorrow", STRING), loadable=True)
    assert isinstance(error, ModelFileError)
    assert "from-tomorrow" in str(error)
    assert "fedbpt" in str(error)


@pytest.mark.parametrize("name", [b"no\nsuch\x1b[31mthing", b"\xff\xfe\x80", "nö\u2028".encode()])
def test_text_from_a_file_is_quoted_in_one_line(llama_parts: Gguf, tmp_path: Path, name: bytes) -> None:
    error = refused(llama_parts, tmp_path, setting("general.architecture", name, STRING))
    assert isinstance(error, UnsupportedModelError)
    assert "\x1b" not in str(error)
