"""No text crashes or hangs any tokenizer; words are split as upstream splits them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import tiny_vocabularies
from tiny_vocabularies import CHARACTERS, KINDS

import fedbpt
from fedbpt import NativeScorer, _native
from fedbpt.errors import InputError, ModelFileError
from fedbpt.tasks.task import MAX_TEXT_BYTES

FORK = Path(__file__).parents[2] / "build" / "llama.cpp" / "src" / "llama-vocab.cpp"

USER_DEFINED = int(gguf.TokenType.USER_DEFINED)

Load = Callable[..., NativeScorer]


def pre_tokenizers() -> list[str]:
    """One pre-tokenizer's name for each of llama.cpp's sets of regular expressions."""
    source = FORK.read_text()
    names: dict[str, str] = {}
    for given, kind in re.findall(r'((?:tokenizer_pre == "[^"]+"[\s|()]*)+)\{[^}]*?PRE_TYPE_(\w+);', source):
        names.setdefault(kind, re.findall(r'"([^"]+)"', given)[0])
    begin = source.index("llm_tokenizer_bpe(const llama_vocab & vocab) {")
    cases = source[begin : source.index("std::vector<std::string> regex_exprs;", begin)].split("break;")
    kinds = [[kind for kind in re.findall(r"case \w+_PRE_TYPE_(\w+):", case) if kind in names] for case in cases]
    return ["default", *(names[group[0]] for group in kinds if group)]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    written: dict[str, Path] = {}

    def path_of(kind: str, pre: str = "default", **more: object) -> Path:
        key = f"{kind} {pre} {more}"
        if key not in written:
            written[key] = tiny_vocabularies.write(folder / f"{len(written)}.gguf", kind, pre, **more)
        return written[key]

    return path_of


@pytest.fixture(scope="module")
def load(write: Callable[..., Path]) -> Load:
    return lambda *given, **more: fedbpt.load_model(write(*given, **more), n_threads=1)


@contextmanager
def std_regex() -> Iterator[None]:
    """Split this thread's texts as upstream does."""
    _native.use_std_regex(True)
    try:
        yield
    finally:
        _native.use_std_regex(False)


@pytest.mark.skipif(
    not hasattr(_native, "use_std_regex"),
    reason="built without -DFEDBPT_TRACE=ON, as wheels are: make setup builds with it",
)
def test_words_are_split_as_upstream_splits_them(load: Load) -> None:
    rng = random.Random(1)
    units = [*CHARACTERS, "'ll", "\r\n", "  ", "<sentinel:12>", "IMGIMGABZ", "aB", "12", "\0"]
    texts = ["".join(rng.choices(units, k=rng.choice([1, 2, 4, 9, 40]))) for _ in range(60)]
    texts += ["".join(rng.choice(units) * rng.choice([1, 2, 3, 520]) for _ in range(8)) for _ in range(6)]
    names = pre_tokenizers()
    assert len(names) > 30
    for pre in names:
        scorer = load("bpe", pre)
        for text in texts:
            found = scorer.tokenize(text).tolist()
            with std_regex():
                assert found == scorer.tokenize(text).tolist(), (pre, text)


@pytest.mark.parametrize("pre", ["gpt-4o", "default", "superbpe", "youtu", "jais-2"])
@pytest.mark.parametrize("text", ["A" * 30_000, "=" * 30_000, " " * 30_000 + "x", "1" * 3_001, "\u4e2d" * 20_000])
def test_a_long_run_has_the_ids_that_upstream_finds_with_a_large_stack(load: Load, pre: str, text: str) -> None:
    scorer = load("bpe", pre)
    expected: list[int] = []

    def upstream() -> None:
        with std_regex():
            expected.extend(scorer.tokenize(text).tolist())

    before = threading.stack_size(256 * 2**20)
    thread = threading.Thread(target=upstream)
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert scorer.tokenize(text).tolist() == expected


LONG_RUNS = r"""
import sys, threading
import fedbpt

runs = [c * 5_000 for c in ("A", "=", " ", "\n", "1", "Aa", "a\u0301", "\u4e2d", "'s", "<", " \n", "q")]
runs += [" " * 5_000 + "x", "  a  b\n\n c"]
threading.stack_size(256 * 2**10)
for path in sys.argv[1:]:
    scorer = fedbpt.load_model(path, n_threads=1)
    counts = []
    thread = threading.Thread(target=lambda: counts.extend(len(scorer.tokenize(run)) for run in runs))
    thread.start()
    thread.join()
    assert len(counts) == len(runs), path
print("all")
"""


def test_long_runs_do_not_overflow_a_small_stack(write: Callable[..., Path]) -> None:
    models = [write("bpe", pre) for pre in pre_tokenizers()] + [write(kind) for kind in KINDS]
    command = [sys.executable, "-c", LONG_RUNS, *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr[-2000:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_text_takes_linear_time(load: Load, kind: str) -> None:
    """With quadratic time this test exceeds its timeout."""
    more = dict.fromkeys(("\n\n", "<unused>"), (USER_DEFINED, 0.0))
    scorer = load(kind, "gpt-4o", more=more)
    for unit in ("A", "\n", "\n\na"):
        assert 0 < len(scorer.tokenize(unit * (MAX_TEXT_BYTES // len(unit)))) <= 2 * MAX_TEXT_BYTES


def test_a_text_over_the_limit_is_refused_by_its_size(load: Load) -> None:
    scorer = load("spm")
    assert len(scorer.tokenize("a" * MAX_TEXT_BYTES)) > 0
    with pytest.raises(InputError, match=str(MAX_TEXT_BYTES + 2)):
        scorer.tokenize("\u00e9" * (MAX_TEXT_BYTES // 2 + 1))


@pytest.mark.parametrize("strips", [False, True])
def test_user_defined_tokens_are_found_as_upstream_finds_them(load: Load, strips: bool) -> None:
    """The longest first, each from the beginning; in models of some names, following blanks are stripped."""
    own = ["<x>", "<xy>", "ab", "aba", "==", "="]
    more = dict.fromkeys([*own, "<|endoftext|>"], (USER_DEFINED, 0.0))
    scorer = load("bpe", "gpt-2", more=more, name="phi-3" if strips else "tiny")
    ids = {token: scorer.tokenize(token).tolist() for token in own}
    assert all(len(found) == 1 for found in ids.values())
    rng = random.Random(2)
    for _ in range(200):
        text = "".join(rng.choices([*own, "a", "b", "<", "x", " ", "\n", "good"], k=12))
        fragments: list[str | int] = [text]
        for token in sorted(own, key=lambda token: -len(token)):
            fragments = [part for fragment in fragments for part in split(fragment, token, ids[token][0], strips)]
        parts = [[part] if isinstance(part, int) else scorer.tokenize(part).tolist() for part in fragments]
        assert scorer.tokenize(text).tolist() == [token for part in parts for token in part]


def split(fragment: str | int, token: str, number: int, strips: bool) -> list[str | int]:
    if isinstance(fragment, int) or token not in fragment:
        return [fragment]
    left, _, right = fragment.partition(token)
    rest = right.lstrip() if strips else right
    return [*([left] if left else []), number, *(split(rest, token, number, strips) if rest else [])]


def test_a_special_token_without_text_is_never_found(load: Load) -> None:
    assert len(load("bpe", more={"": (USER_DEFINED, 0.0)}).tokenize("aA")) == 1


@pytest.mark.parametrize("pre", ["gemma4", "sarvam-moe", "whitespace"])
def test_blanks_in_a_vocabulary_without_bytes_are_no_merge(load: Load, pre: str) -> None:
    assert len(load("bpe", pre).tokenize("a  b   c\n\n  ")) > 0


def test_a_byte_that_begins_no_rwkv_token_is_unknown(load: Load) -> None:
    scorer = load("rwkv")
    assert scorer.tokenize("qa").tolist() == [scorer.n_vocab - 1]
    assert scorer.tokenize("qqb").tolist() == [0, 0, *scorer.tokenize("b").tolist()]


def test_a_character_that_the_vocabulary_cannot_spell_is_refused(load: Load) -> None:
    assert len(load("spm").tokenize("Q")) > 0
    with pytest.raises(ModelFileError):
        load("spm", without="Q")
