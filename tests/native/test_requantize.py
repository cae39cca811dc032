"""Writing a model in another format, and what is left after a failure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from tests.support.raises import raises
from tiny_case import Case

import fedbpt
from fedbpt import _native, cli, models
from fedbpt.errors import FedbptError, InputError, ModelError, ModelFileError, ModelNotFoundError


@pytest.fixture
def model(llama: Case, tmp_path: Path) -> Path:
    """A float32 model, the only file in its folder."""
    return Path(shutil.copyfile(llama.path, tmp_path / "tiny.gguf"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_formats_are_those_of_the_native_module() -> None:
    assert list(models.FORMATS) == _native.requantize_formats()


@pytest.mark.parametrize("format", models.FORMATS)
def test_every_format_can_be_written_and_used_by_its_path(model: Path, format: str) -> None:
    written = models.requantize(model, format, n_threads=1)
    assert written.path == model.with_name(f"tiny.{format}.gguf")
    assert (written.format, written.source) == (format, model)
    assert (written.size, written.source_size) == (written.path.stat().st_size, model.stat().st_size)
    assert written.size < written.source_size
    assert set(names(model.parent)) == {"tiny.gguf", f"tiny.{format}.gguf"}
    scorer = fedbpt.load_model(written.path, n_threads=1)
    assert scorer.name == f"tiny.{format}"
    assert np.isfinite(scorer.score_with_soft_prompt([[5, 6, 7]], np.zeros((1, 1, scorer.n_embd)))).all()


def test_a_model_in_q8_0_scores_as_one_that_was_converted_to_it(llama: Case, case_of: Callable[..., Case]) -> None:
    converted = case_of("llama", "q8_0")
    written = models.requantize(llama.path, "q8_0", llama.path.with_name("again-q8_0.gguf"), n_threads=1)
    texts, embeds = llama.texts([12, 30]), llama.prompts(2, 3)
    ours = fedbpt.load_model(written.path, n_threads=1).score_with_soft_prompt(texts, embeds)
    np.testing.assert_allclose(ours, converted.scorer.score_with_soft_prompt(texts, embeds), atol=0.05)


def test_a_quantised_model_can_be_requantised(case_of: Callable[..., Case], tmp_path: Path) -> None:
    source = case_of("llama", "q4_1").path
    written = models.requantize(source, "q4_0", tmp_path / "out.gguf", n_threads=2)
    assert [part.type for part in models.weight_formats(source)] == ["q4_1"]
    assert [part.type for part in models.weight_formats(written.path)] == ["q4_0"]


def test_progress_counts_tensors(model: Path) -> None:
    reported: list[tuple[int, int | None]] = []
    models.requantize(model, "q4_0", n_threads=1, progress=lambda done, total: reported.append((done, total)))
    count = len(tiny_gguf.tensors(tiny_gguf.LLAMA))
    assert reported == [(done, count) for done in range(count + 1)]


def test_an_exception_from_progress_ends_the_work_and_leaves_nothing(model: Path) -> None:
    def interrupt(done: int, _total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.requantize(model, "q4_0", n_threads=1, progress=interrupt)
    assert names(model.parent) == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda model: tiny_gguf.write_not_gguf(model), ModelFileError),
        (lambda model: tiny_gguf.write_truncated(model, model, 0.5), ModelFileError),
        (lambda model: model.unlink(), ModelNotFoundError),
    ],
)
def test_a_damaged_source_is_named_and_leaves_nothing(
    model: Path, spoil: Callable[[Path], object], error: type[FedbptError]
) -> None:
    spoil(model)
    before = names(model.parent)
    with raises(error) as failed:
        models.requantize(model, "q4_0", n_threads=1)
    assert "tiny.gguf" in str(failed.value)
    assert names(model.parent) == before


def test_an_unknown_format_is_refused_with_the_choices(model: Path) -> None:
    with raises(InputError, field="format") as refused:
        models.requantize(model, "q4")
    assert all(name in str(refused.value) for name in models.FORMATS)


def test_zero_threads_are_refused(model: Path) -> None:
    with raises(InputError, field="n_threads"):
        models.requantize(model, "q4_0", n_threads=0)


def test_an_existing_file_is_replaced_only_by_force(model: Path) -> None:
    there = model.with_name("there.gguf")
    there.write_text("precious")
    with raises(InputError, field="out") as refused:
        models.requantize(model, "q4_0", there)
    assert "there.gguf" in str(refused.value)
    assert there.read_text() == "precious"
    models.requantize(model, "q4_0", there, force=True, n_threads=1)
    assert [part.type for part in models.weight_formats(there)] == ["q4_0"]


def test_the_source_is_never_replaced(model: Path) -> None:
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    before = model.read_bytes()
    for out in (model, link):
        with raises(InputError, field="out"):
            models.requantize(model, "q4_0", out, force=True)
    assert model.read_bytes() == before


def test_a_folder_as_the_target_is_refused(model: Path) -> None:
    with raises(InputError, field="out"):
        models.requantize(model, "q4_0", model.parent, force=True)


@pytest.mark.parametrize("folder", ["absent", "tiny.gguf"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(model: Path, folder: str) -> None:
    def never(_done: int, _total: int | None) -> None:
        pytest.fail("the work began")

    with raises(ModelError) as failed:
        models.requantize(model, "q4_0", model.parent / folder / "out.gguf", progress=never)
    assert f"{folder}/out.gguf" in str(failed.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(model: Path) -> None:
    """In a child process whose files are limited to 4 KiB."""
    script = f"""
import resource
from fedbpt import models
from fedbpt.errors import ModelFileError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    models.requantize({str(model)!r}, "f16", n_threads=1)
except ModelFileError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith("refused:")
    assert "tiny.gguf" in done.stdout
    assert names(model.parent) == ["tiny.gguf"]


def test_the_command_prints_the_path_and_a_command_to_check_it(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["models", "requantize", str(model), "q4_0", "--threads", "1", *options])
        assert ended.value.code == 0
        out, err = capfd.readouterr()
        return out, err

    out, err = run()
    path = model.with_name("tiny.q4_0.gguf")
    assert out == f"{path}\n"
    assert "fedbpt evaluate" in err.splitlines()[-1]
    assert run("--force", "--quiet") == (f"{path}\n", "")
    out, err = run("--force", "--json")
    assert json.loads(out) == {
        "path": str(path),
        "fingerprint": models.fingerprint(path),
        "format": "q4_0",
        "size_bytes": path.stat().st_size,
        "source": str(model),
        "source_size_bytes": model.stat().st_size,
    }
    assert err == ""
