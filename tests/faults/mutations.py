"""Model files with mutated headers, by seed."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from tests.native import tiny_gguf
from tests.native.gguf_bytes import ARRAY, CODES, STRING, Gguf, Setting, Tensor, read

NUMBERS = (0, 1, 2, 3, 7, 8, 13, 32, 255, 1000, 65535, 2**20, 2**24, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**63, -1, -2)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e10, 3e38, float("inf"), float("-inf"), float("nan"))
ARCHITECTURES = tuple(gguf.MODEL_ARCH_NAMES.values())
TOKENIZERS = tuple(b"llama gpt2 bert t5 rwkv plamo2 gemma4 test none no_vocab hybriddna whitespace".split())
SPLITTERS = tuple(b"default llama-bpe deepseek-v3 gpt-4o qwen2 tekken viking gemma4 kimi-k2 new".split())
TEXTS = (b"", b"\n", b"\x00", b"\xff\xfe", b"a" * 5000, *b"<0x0A> <0xZZ> </s> <unk> phi-3 yarn longrope none".split())


def _keys() -> Iterator[str]:
    """All keys of the gguf package, with ``{arch}`` in place of an architecture."""
    for group in (each for each in vars(gguf.Keys).values() if isinstance(each, type)):
        yield from (key for name, key in vars(group).items() if isinstance(key, str) and not name.startswith("_"))


KEYS = tuple(sorted(set(_keys())))


def sources(folder: Path) -> dict[str, Gguf]:
    """Valid tiny models of several architectures, tokenizers and weight formats."""
    tiny = {"llama": tiny_gguf.SMALLEST}
    tiny["llama-bpe"] = replace(tiny_gguf.SMALLEST, tokenizer="bpe", pre="smollm", add_bos=False, tied=True)
    tiny["qwen2"] = replace(tiny["llama-bpe"], architecture="qwen2", pre="qwen2")
    tiny["gemma3"] = replace(tiny_gguf.GEMMA3, n_layer=2, n_embd=32, n_head=2, n_head_kv=1, n_ff=32)
    tiny["q8_0"] = replace(tiny_gguf.SMALLEST, weights="q8_0")
    found = {name: read(tiny_gguf.write(folder / f"{name}.gguf", model).read_bytes()) for name, model in tiny.items()}
    found["experts"] = _with_experts(found["llama"])
    for model in (b"t5", b"rwkv", b"bert", b"plamo2"):
        other = copy.deepcopy(found["llama"])
        other.find("tokenizer.ggml.model").value = model
        if model in (b"rwkv", b"bert"):  # they have no byte tokens
            types = other.find("tokenizer.ggml.token_type")
            types.value = [1 if type == gguf.TokenType.BYTE else type for type in types.value]
            texts = other.find("tokenizer.ggml.tokens").value
            texts[3:259] = [f"\\x{byte:02x}".encode() for byte in range(256)]
        found[model.decode()] = other
    charsmap = struct.pack("<I", 1024) + bytes(1024 + 1)  # without rules
    found["t5"].settings.append(Setting(b"tokenizer.ggml.precompiled_charsmap", ARRAY, list(charsmap), item=0))
    return found


def _with_experts(dense: Gguf) -> Gguf:
    """``dense`` as a mixture of four experts, two of which are used."""
    model, rng = copy.deepcopy(dense), np.random.default_rng(1)
    model.settings += [Setting(b"llama.expert_count", 4, 4), Setting(b"llama.expert_used_count", 4, 2)]
    width, inner = model.find("llama.embedding_length").value, model.find("llama.feed_forward_length").value
    sizes = {tensor.name: tensor for tensor in model.tensors}
    shapes = {"ffn_gate_inp": [width, 4], "ffn_gate_exps": [width, inner, 4], "ffn_up_exps": [width, inner, 4]}
    shapes["ffn_down_exps"] = [inner, width, 4]
    data = b""
    tensors = []
    for tensor in sizes.values():
        if not any(part in tensor.name for part in (b"ffn_gate", b"ffn_up", b"ffn_down")):
            size = 4 * int(np.prod(tensor.shape))
            tensors.append(replace(tensor, offset=len(data)))
            data += model.data[tensor.offset : tensor.offset + size + -size % 32]
    for name, shape in shapes.items():
        values = (rng.standard_normal(np.prod(shape)) / np.sqrt(shape[0])).astype(np.float32).tobytes()
        tensors.append(Tensor(f"blk.0.{name}.weight".encode(), shape, 0, len(data)))
        data += values + bytes(-len(values) % 32)
    return replace(model, tensors=tensors, data=data)


def mutated(rng: random.Random, source: Gguf) -> bytes:
    """A file like ``source`` with one to three mutations."""
    model = copy.deepcopy(source)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        rng.choices(*zip(*_MUTATIONS, strict=True))[0](rng, model)  # type: ignore[arg-type]
    data = bytearray(model.write())
    if rng.random() < 0.15:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            data[rng.randrange(len(data) - len(model.data))] ^= 1 << rng.randrange(8)
    elif rng.random() < 0.03:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def _number(rng: random.Random, old: object) -> float:
    if isinstance(old, float) or rng.random() < 0.1:
        return rng.choice((*FLOATS, rng.uniform(-2, 2)))
    near = int(old) if isinstance(old, int) else 0
    return rng.choice((*NUMBERS, near + 1, near - 1, 2 * near, near // 2, rng.randrange(300)))


def _text(rng: random.Random, key: bytes, old: bytes) -> bytes:
    if key == b"general.architecture":
        return rng.choice(ARCHITECTURES).encode()
    if key == b"tokenizer.ggml.model":
        return rng.choice(TOKENIZERS)
    if key == b"tokenizer.ggml.pre":
        return rng.choice(SPLITTERS)
    bytes_ = rng.randbytes(rng.randrange(1, 12))
    return rng.choice((*TEXTS, old + old, old[: len(old) // 2], bytes_, _flipped(rng, old)))


def _flipped(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\x01"
    at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def _change_value(rng: random.Random, model: Gguf) -> None:
    setting = rng.choice(model.settings)
    if setting.type == ARRAY:
        _change_array(rng, setting)
    elif isinstance(setting.value, bytes):
        setting.value = _text(rng, setting.key, setting.value)
    else:
        setting.value = _number(rng, setting.value)


def _change_array(rng: random.Random, setting: Setting) -> None:
    items = setting.value
    if not items:
        return
    at = rng.randrange(len(items))
    match rng.randrange(7):
        case 0:
            del items[at:]
        case 1:
            del items[at]
        case 2:
            items.insert(at, items[rng.randrange(len(items))])
        case 3:
            rng.shuffle(items)
        case 4:
            items[at] = items[rng.randrange(len(items))]
        case _:
            for _ in range(rng.choice((1, 1, 3, 20))):
                at = rng.randrange(len(items))
                old = items[at]
                items[at] = _text(rng, b"", old) if isinstance(old, bytes) else _number(rng, old)


def _change_type(rng: random.Random, model: Gguf) -> None:
    setting = rng.choice(model.settings)
    if setting.type == ARRAY and rng.random() < 0.5:
        setting.item = rng.choice((*CODES, STRING, 13, 255))
    elif setting.type == ARRAY:
        setting.type, setting.value = STRING, b"x"
    elif rng.random() < 0.2:
        setting.item, setting.type, setting.value = setting.type, ARRAY, [setting.value] * rng.randrange(4)
    else:
        setting.type = rng.choice((*CODES, STRING))


def _drop_setting(rng: random.Random, model: Gguf) -> None:
    del model.settings[rng.randrange(len(model.settings))]


def _add_setting(rng: random.Random, model: Gguf) -> None:
    named = (each.value for each in model.settings if each.key == b"general.architecture" and each.type == STRING)
    key = rng.choice(KEYS).replace("{arch}", next(named, b"llama").decode(errors="ignore"))
    type = rng.choice((4, 4, 4, 6, 6, 7, STRING, ARRAY))
    value = _text(rng, key.encode(), b"x") if type == STRING else _number(rng, 1.0 if type == 6 else 1)
    if type == ARRAY:
        item = rng.choice((4, 5, 6, 7, STRING))
        value = [_number(rng, 1.0 if item == 6 else 1) for _ in range(rng.choice((0, 1, 4, 512, 600)))]
        if item == STRING:
            value = [rng.choice(TEXTS) for _ in value]
        model.settings.append(Setting(key.encode(), type, value, item))
    else:
        model.settings.append(Setting(key.encode(), type, value))


def _rename_setting(rng: random.Random, model: Gguf) -> None:
    setting = rng.choice(model.settings)
    setting.key = rng.choice((_flipped(rng, setting.key), rng.choice(model.settings).key))


def _change_tensor(rng: random.Random, model: Gguf) -> None:
    tensor = rng.choice(model.tensors)
    match rng.randrange(7):
        case 0:
            tensor.name = rng.choice((_flipped(rng, tensor.name), rng.choice(model.tensors).name, b"x" * 70, b""))
        case 1:
            tensor.type = rng.choice((*range(42), -1, 255))
        case 2 if tensor.shape:
            at = rng.randrange(len(tensor.shape))
            tensor.shape[at] = rng.choice((*NUMBERS, tensor.shape[at] + 1, 2 * tensor.shape[at], tensor.shape[at] // 2))
        case 3:
            tensor.shape = rng.choice((tensor.shape[::-1], [*tensor.shape, 1, 1], tensor.shape[:-1], []))
        case 4:
            tensor.offset = int(rng.choice((*NUMBERS, tensor.offset + 1, tensor.offset + 32)))
        case 5:
            model.tensors.remove(tensor)
        case _:
            model.tensors.append(copy.copy(tensor))


def _swap_types(rng: random.Random, model: Gguf) -> None:
    """Change types to others of the same size: integers for floats."""
    for tensor in model.tensors:
        tensor.type = {0: 26, 1: 25, 8: 24}.get(tensor.type, tensor.type) if rng.random() < 0.5 else tensor.type


def _change_counts(rng: random.Random, model: Gguf) -> None:
    model.counts[rng.choice(("tensors", "settings", "items"))] = rng.choice((0, 1, 2**16, 2**31, 2**40, 2**63))


def _change_frame(rng: random.Random, model: Gguf) -> None:
    model.version = rng.choice((0, 1, 2, 4, 2**24, 2**31))


_MUTATIONS: tuple[tuple[Callable[[random.Random, Gguf], None], int], ...] = (
    (_change_value, 40),
    (_change_type, 3),
    (_drop_setting, 4),
    (_add_setting, 25),
    (_rename_setting, 2),
    (_change_tensor, 6),
    (_swap_types, 1),
    (_change_counts, 1),
    (_change_frame, 1),
)
