"""A model in several files: it is loaded, fingerprinted, measured and described by all of its parts."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt import cli, models
from fedbpt.cli.device import _kv_bytes
from fedbpt.errors import InputError, ModelFileError, ModelNotFoundError, PromptError
from fedbpt.machine.memory import kv_budget_within
from fedbpt.protocol.specs import PromptSpec, Template

LABELS = [259, 3, 411]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDBPT_CACHE", str(folder))
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The tiny llama in three files; the output matrix is in the third."""
    folder = tmp_path / "split"
    folder.mkdir()
    return tiny_gguf.write_split(folder, tiny_gguf.LLAMA)


def alter(part: Path, at: int = -40) -> None:
    """Flip bits of one weight."""
    content = bytearray(part.read_bytes())
    content[at] ^= 0xFF
    part.write_bytes(content)


def one_line(error: BaseException) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1
    return message


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
@pytest.mark.parametrize("label_ids", [None, LABELS])
def test_it_scores_as_the_model_in_one_file_bit_for_bit(
    case_of: Callable[..., Case], tmp_path: Path, weights: tiny_gguf.Weights, label_ids: list[int] | None
) -> None:
    whole = case_of("llama", weights)
    first, *_ = tiny_gguf.write_split(tmp_path, whole.model)
    texts, embeds = whole.texts([9, 40, 3]), whole.prompts(3, 2)
    split = fedbpt.load_model(first, n_threads=N_THREADS)
    for placement in ("front", "cue"):
        expected = whole.scorer.score_with_soft_prompt(texts, embeds, label_ids, placement)
        assert np.array_equal(split.score_with_soft_prompt(texts, embeds, label_ids, placement), expected)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_part_loads_the_model(parts: list[Path], number: int) -> None:
    given = parts[number]
    assert models.locate(given) == models.locate(str(given)) == parts[0]
    assert models.model_parts(given) == tuple(parts)
    assert models.fingerprint(given) == models.fingerprint(parts[0])
    scorer = fedbpt.load_model(str(given), n_threads=N_THREADS)
    assert scorer.name == fedbpt.load_model(parts[0], n_threads=N_THREADS).name == "tiny-00001-of-00003"
    assert scorer.fingerprint == models.fingerprint(parts[0])


def test_links_to_the_parts_work_as_a_hub_cache_makes_them(parts: list[Path], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, part in enumerate(parts):
        (snapshot / part.name).symlink_to(part.rename(blobs / (8 * f"{i:x}")))
    scorer = fedbpt.load_model(snapshot / parts[1].name, n_threads=N_THREADS)
    assert np.isfinite(scorer.score_with_soft_prompt([[5, 6]], np.zeros((1, 1, scorer.n_embd)), LABELS)).all()
    assert models.model_size(snapshot / parts[0].name) == sum(blob.stat().st_size for blob in blobs.iterdir())


def test_a_link_of_another_name_leads_to_all_parts(parts: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "model.gguf"
    link.symlink_to(parts[0])
    assert models.locate(link) == parts[0]
    fedbpt.load_model(link, n_threads=N_THREADS)


def test_a_model_in_one_file_may_be_named_like_a_part(llama: Case, tmp_path: Path) -> None:
    path = tmp_path / "tiny-00002-of-00003.gguf"
    shutil.copyfile(llama.path, path)
    assert models.model_parts(path) == (path,)
    assert models.fingerprint(path) == models.fingerprint(llama.path)
    fedbpt.load_model(path, n_threads=N_THREADS)


# --- properties ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_joined_files(parts: list[Path]) -> None:
    joined = b"".join(part.read_bytes() for part in parts)
    assert models.fingerprint(parts[0]) == f"sha256:{hashlib.sha256(joined).hexdigest()}"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_change_in_any_part_changes_the_fingerprint(parts: list[Path], number: int) -> None:
    before = models.fingerprint(parts[0])
    alter(parts[number])
    assert models.fingerprint(parts[0]) != before


def test_a_prompt_refuses_a_model_with_another_third_part(parts: list[Path]) -> None:
    scorer = fedbpt.load_model(parts[0], n_threads=N_THREADS)
    prompt = fedbpt.Prompt(
        rows=np.ones((2, scorer.n_embd)),
        spec=PromptSpec(n_prompt=2, d=20, seed=3),
        task_name="mood",
        labels=("bad", "good"),
        template=Template(pattern="{text}\nMood:", label_words=(" bad", " good")),
        model_fingerprint=scorer.fingerprint,
        model_name=scorer.name,
        architecture=scorer.architecture,
        label_bias=np.zeros(2),
    )
    prompt.check(scorer)
    alter(parts[2])
    with pytest.raises(PromptError):
        prompt.check(fedbpt.load_model(parts[0], n_threads=N_THREADS))


def test_the_fingerprint_is_computed_once_for_all_parts(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = models.fingerprint(parts[0])
    monkeypatch.setattr(models.fingerprints, "sha256_of", lambda *_: pytest.fail("computed again"))
    assert models.fingerprint(parts[2]) == before


def test_sizes_formats_and_shapes_are_those_of_the_whole_model(llama: Case, parts: list[Path]) -> None:
    assert models.model_size(parts[1]) == sum(part.stat().st_size for part in parts)
    for part in parts:
        assert models.weight_formats(part) == models.weight_formats(llama.path)
        assert models.tensor_shapes(part) == models.tensor_shapes(llama.path)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_max_memory_counts_all_parts(parts: list[Path], number: int) -> None:
    weights = sum(part.stat().st_size for part in parts)
    expected = kv_budget_within(100 * 2**20, weights, wanted=2**40)
    assert _kv_bytes(str(parts[number]), 2**20, max_memory=100) == expected


def test_requantize_reads_all_parts_and_writes_one_file(llama: Case, parts: list[Path]) -> None:
    written = models.requantize(parts[1], "q8_0", n_threads=1)
    assert written.path == parts[0].with_name("tiny.q8_0.gguf")
    assert written.source_size == sum(part.stat().st_size for part in parts)
    assert models.tensor_shapes(written.path) == models.tensor_shapes(llama.path)
    whole = models.requantize(llama.path, "q8_0", parts[0].with_name("whole.gguf"), n_threads=1)
    texts, embeds = llama.texts([12, 30]), llama.prompts(2, 3)
    ours = fedbpt.load_model(written.path, n_threads=1).score_with_soft_prompt(texts, embeds)
    assert np.array_equal(ours, fedbpt.load_model(whole.path, n_threads=1).score_with_soft_prompt(texts, embeds))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_requantize_never_replaces_a_part_of_its_source(parts: list[Path], number: int) -> None:
    before = parts[number].read_bytes()
    with pytest.raises(InputError):
        models.requantize(parts[0], "q8_0", parts[number], force=True, n_threads=1)
    assert parts[number].read_bytes() == before


# --- errors name the part --------------------------------------------------------------------------------------------


def readers() -> Iterator[Callable[[Path], object]]:
    """All functions that read a model by its path."""
    yield fedbpt.load_model
    yield models.locate
    yield models.fingerprint
    yield models.model_size
    yield models.weight_formats
    yield models.tensor_shapes
    yield lambda path: models.requantize(path, "q8_0", n_threads=1)


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("read", list(readers()))
def test_a_missing_part_is_named(parts: list[Path], read: Callable[[Path], object], missing: int) -> None:
    parts[missing].unlink()
    given = parts[1 if missing == 0 else 0]
    with pytest.raises(ModelFileError) as failed:
        read(given)
    assert parts[missing].name in one_line(failed.value)


def test_a_missing_part_that_is_given_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    with pytest.raises(ModelNotFoundError) as failed:
        fedbpt.load_model(parts[2])
    assert parts[2].name in one_line(failed.value)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_truncated_part_is_named(parts: list[Path], number: int, keep: float) -> None:
    whole = parts[number].read_bytes()
    parts[number].write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(parts[0])
    assert parts[number].name in one_line(failed.value)


def test_swapped_parts_are_refused(parts: list[Path], tmp_path: Path) -> None:
    parts[1].rename(tmp_path / "second")
    parts[2].rename(parts[1])
    (tmp_path / "second").rename(parts[2])
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(parts[0])
    assert parts[1].name in one_line(failed.value)


def test_a_part_of_a_model_in_more_files_is_refused(parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copyfile(tiny_gguf.write_split(tmp_path / "other", tiny_gguf.LLAMA, 4)[1], parts[1])
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(parts[0])
    assert parts[1].name in one_line(failed.value)


@pytest.mark.parametrize("number", [0, 1])
def test_a_renamed_part_is_refused_with_its_name(parts: list[Path], number: int) -> None:
    renamed = parts[number].rename(parts[number].with_name("model.gguf"))
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(renamed)
    assert f"-{number + 1:05d}-of-00003.gguf" in one_line(failed.value)


@pytest.mark.parametrize("key", ["split.no", "split.count"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_number_of_another_type_does_not_end_the_process(parts: list[Path], number: int, key: str) -> None:
    content = parts[number].read_bytes()
    name = key.encode()
    at = content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    kind = int(gguf.GGUFValueType.INT16).to_bytes(4, "little")
    parts[number].write_bytes(content[:at] + kind + content[at + 4 :])
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(parts[0])
    assert parts[number].name in one_line(failed.value)


def test_models_path_takes_any_part(
    parts: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts[0].parent)
    with pytest.raises(SystemExit) as ended:
        cli.main(["models", "path", parts[2].name])
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, parts[0].name)


# --- memory ------------------------------------------------------------------------------------------------------


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that are resident in this process."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="what is resident is read from Linux's /proc")
def test_the_pages_of_all_parts_are_released(parts: list[Path]) -> None:
    scorer = fedbpt.load_model(parts[0], n_threads=N_THREADS)
    scorer.score_with_soft_prompt([[5, 6, 7]], np.zeros((1, 1, scorer.n_embd)))
    assert all(resident_bytes(part) > 0 for part in parts)
    assert scorer.embedding_std > 0
    assert [resident_bytes(part) for part in parts] == [0, 0, 0]
