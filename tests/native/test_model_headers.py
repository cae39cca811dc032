"""Models that are refused by what their files say, before any weight is loaded."""

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
    """The smallest llama, in parts."""
    path = tmp_path_factory.mktemp("headers") / "llama.gguf"
    return read(tiny_gguf.write(path, tiny_gguf.SMALLEST).read_bytes())


def setting(key: str, value: Any, type: int = U32, item: int = 0) -> Edit:
    """Sets a key, new or not."""

    def edit(model: Gguf) -> None:
        model.settings = [each for each in model.settings if each.key != key.encode()]
        model.settings.append(Setting(key.encode(), type, value, item))

    return edit


def refused(model: Gguf, folder: Path, edit: Edit, *, loadable: bool = False) -> ModelError:
    """What loading an edited model raises. Unless ``loadable`` it lacks a tensor, which must come after its header."""
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


def test_what_is_edited_loads_unedited(llama_parts: Gguf, tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    path.write_bytes(llama_parts.write())
    assert _native.Engine(str(path).encode(), 1, 0, "", False).architecture == "llama"


ENCODERS = (
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding llama-embed"
)
RECURRENT = "mamba mamba2 rwkv6 rwkv7 jamba falcon-h1 granitehybrid lfm2 nemotron_h qwen3next qwen35 kimi-linear"
OTHERS = "t5 t5encoder dream llada llada-moe rnd1 clip wavtokenizer-dec gemma3n gemma4 deepseek4 eagle3 no-such-thing"


@pytest.mark.parametrize("architecture", [*ENCODERS.split(), *RECURRENT.split(), *OTHERS.split()])
def test_what_is_no_causal_decoder_is_refused_by_name(llama_parts: Gguf, tmp_path: Path, architecture: str) -> None:
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
def test_a_model_for_other_work_is_refused_by_what_says_so(
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
def test_a_setting_that_cannot_be_is_named(llama_parts: Gguf, tmp_path: Path, key: str, value: float) -> None:
    edit = setting(f"llama.{key}", value, F32 if isinstance(value, float) else U32)
    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    words = {"head_count": "attention heads", "head_count_kv": "attention heads", "expert_used_count": "experts"}
    assert words.get(key.rpartition(".")[2], key) in str(error)


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
def test_numbers_of_experts_that_contradict_each_other_are_refused(
    llama_parts: Gguf, tmp_path: Path, counts: dict[str, int]
) -> None:
    def edit(model: Gguf) -> None:
        for key, value in counts.items():
            setting(f"llama.{key}", value)(model)

    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert "experts" in str(error)


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
    ("edit", "words"),
    [
        (twice, "twice"),
        (cut("tokenizer.ggml.scores"), "10 entries"),
        (cut("tokenizer.ggml.token_type"), "10 entries"),
        (fewer_tokens, "415"),
        (setting("tokenizer.ggml.tokens", [], ARRAY, STRING), "vocabulary"),
        (setting("tokenizer.ggml.tokens", [1, 2], ARRAY, I32), "tokenizer.ggml.tokens"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    llama_parts: Gguf, tmp_path: Path, edit: Edit, words: str
) -> None:
    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert words in str(error)


@pytest.mark.parametrize("type", [gguf.GGMLQuantizationType.I32, gguf.GGMLQuantizationType.I8])
def test_whole_numbers_are_no_weights(llama_parts: Gguf, tmp_path: Path, type: gguf.GGMLQuantizationType) -> None:
    def edit(model: Gguf) -> None:
        model.tensors[-1].type = int(type)

    error = refused(llama_parts, tmp_path, edit)
    assert isinstance(error, ModelFileError)
    assert llama_parts.tensors[-1].name.decode() in str(error)


def test_a_file_without_weights_is_no_model(llama_parts: Gguf, tmp_path: Path) -> None:
    def edit(model: Gguf) -> None:
        model.tensors, model.data = [], b""

    assert isinstance(refused(llama_parts, tmp_path, edit), UnsupportedModelError)


def test_a_file_that_is_cut_short_says_by_how_much(llama_parts: Gguf, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    whole = llama_parts.write()
    path.write_bytes(whole[:-100_000])
    with pytest.raises(ModelFileError) as failed:
        _native.Engine(str(path).encode(), 1, 0, "", False)
    assert str(len(whole) - 100_000) in str(failed.value)


@pytest.mark.parametrize(
    ("edit", "reason", "advice"),
    [
        (setting("tokenizer.ggml.model", b"newest", STRING), "newest", "newer fedbpt"),
        (lambda model: setattr(model.tensors[3], "name", b"blk.0.attn_k_new"), "attn_k", "newer fedbpt"),
        (setting("llama.feed_forward_length", 48), "wrong shape", "newer fedbpt"),
        (setting("llama.context_length", 512.0, F32), "llama.context_length", "newer fedbpt"),
        (lambda model: setattr(model, "version", 4), "version 4", "newer fedbpt"),
        (lambda model: setattr(model, "version", 1), "GGUFv1", "newer file"),
        (lambda model: setattr(model, "version", struct.unpack(">I", b"\3\0\0\0")[0]), "endian", "little-endian"),
    ],
)
def test_the_reason_of_a_failure_is_the_first_one_and_the_advice_fits_it(
    llama_parts: Gguf, tmp_path: Path, edit: Edit, reason: str, advice: str
) -> None:
    error = refused(llama_parts, tmp_path, edit, loadable=True)
    assert reason in str(error)
    assert advice in str(error)
    assert "(failed to load model)" not in str(error)


def test_a_vocabulary_of_an_unknown_kind_asks_for_a_newer_fedbpt(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    model = tiny_gguf.LLAMA_BPE
    parts = read(tiny_gguf.write(path, model).read_bytes())
    error = refused(parts, tmp_path, setting("tokenizer.ggml.pre", b"from-tomorrow", STRING), loadable=True)
    assert isinstance(error, ModelFileError)
    assert "from-tomorrow" in str(error)
    assert "newer fedbpt" in str(error)


@pytest.mark.parametrize("name", [b"no\nsuch\x1b[31mthing", b"\xff\xfe\x80", "nö\u2028".encode()])
def test_what_a_file_says_is_quoted_in_one_line(llama_parts: Gguf, tmp_path: Path, name: bytes) -> None:
    error = refused(llama_parts, tmp_path, setting("general.architecture", name, STRING))
    assert isinstance(error, UnsupportedModelError)
    assert "\x1b" not in str(error)
