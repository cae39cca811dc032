"""`fedbpt.check_model` passes correct models, and names the property that a wrong one violates."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from tiny_case import Case

import fedbpt
from fedbpt import cli
from fedbpt.engine.text_generator import Token
from fedbpt.errors import InputError, ModelNotFoundError
from fedbpt.model_check import CHECKS, Finding, ModelCheck, ModelFacts
from fedbpt.model_check.child import Settings, examine
from fedbpt.model_check.probes import Probes


def failed(check: ModelCheck) -> list[str]:
    return [finding.name for finding in check.findings if finding.holds is False]


@pytest.mark.parametrize("name", list(tiny_gguf.MODELS))
@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0", "q4_1"])
def test_all_checks_pass_for_correct_models(
    case_of: Callable[..., Case], name: str, weights: tiny_gguf.Weights
) -> None:
    told: list[Any] = []
    examine(case_of(name, weights).path, Settings(1, 0, None, "f16", 60), told.append)
    findings = [said for said in told if isinstance(said, Finding)]
    assert [(finding.name, finding.holds) for finding in findings] == [(check, True) for check in CHECKS]


def test_facts_of_a_model_are_reported(llama: Case) -> None:
    found = fedbpt.check_model(llama.path, n_threads=1)
    assert found.holds
    assert found.facts == ModelFacts(
        architecture="llama",
        n_params=sum(values.size for values in tiny_gguf.tensors(llama.model).values()),
        size=llama.path.stat().st_size,
        n_files=1,
        formats=("f32",),
        n_ctx=llama.model.n_ctx,
        n_vocab=llama.model.n_vocab,
        n_embd=llama.model.n_embd,
        chat=False,
        fingerprint=llama.scorer.fingerprint,
        notes=(),
    )


@pytest.mark.parametrize("n_ctx", [8, 12, 40])
def test_a_short_context_passes(tmp_path: Path, n_ctx: int) -> None:
    path = tiny_gguf.write(tmp_path / "short.gguf", tiny_gguf.TinyModel("llama", "spm", n_ctx=n_ctx))
    told: list[Any] = []
    examine(path, Settings(1, 0, None, "f16", 60), told.append)
    assert [said.detail for said in told if isinstance(said, Finding) and not said.holds] == []


# --- promises that are broken ------------------------------------------------------------------------------------


class Tampered:
    """A scorer that violates one property."""

    def __init__(self, case: Case) -> None:
        self._scorer = case.scorer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score_with_soft_prompt(self, *given: Any) -> Any:
        return self._scorer.score_with_soft_prompt(*given)


class LosesBytes(Tampered):
    def tokenize(self, text: str, add_bos: bool | None = None) -> Any:
        return self._scorer.tokenize(text.replace("\t", " "), add_bos)


class ScalesEmbeddings(Tampered):
    def token_embeddings(self, ids: Any) -> Any:
        return 1.5 * self._scorer.token_embeddings(ids)


class CountsCandidates(Tampered):
    def score_with_soft_prompt(self, texts: Any, embeds: Any, *given: Any) -> Any:
        return self._scorer.score_with_soft_prompt(texts, embeds, *given) + np.float32(1e-5 * len(embeds))


class OrdersCandidates(Tampered):
    def score_with_soft_prompt(self, texts: Any, embeds: Any, *given: Any) -> Any:
        found = self._scorer.score_with_soft_prompt(texts, embeds, *given)
        return found + np.float32(1e-5) * np.arange(len(embeds), dtype=np.float32)[:, None, None]


class CountsTexts(Tampered):
    def score_with_soft_prompt(self, texts: Any, *given: Any) -> Any:
        return self._scorer.score_with_soft_prompt(texts, *given) + np.float32(0.5 * len(texts))


class Remembers(Tampered):
    n_calls = 0

    def score_with_soft_prompt(self, *given: Any) -> Any:
        self.n_calls += 1
        return self._scorer.score_with_soft_prompt(*given) + np.float32(1e-5 * self.n_calls)


class GivesNan(Tampered):
    def score_with_soft_prompt(self, *given: Any) -> Any:
        return np.full_like(self._scorer.score_with_soft_prompt(*given), np.nan)


class MixesLabels(Tampered):
    def score_with_soft_prompt(self, texts: Any, embeds: Any, label_ids: Any = None, *given: Any) -> Any:
        found = self._scorer.score_with_soft_prompt(texts, embeds, label_ids, *given)
        return found if label_ids is None else found[..., ::-1]


class SpeaksOtherwise(Tampered):
    """Generated tokens have other log-probabilities."""

    @property
    def generator(self) -> Any:
        return self

    def open(self, *given: Any) -> Any:
        stream = self._scorer.generator.open(*given)

        class Stream:
            cancel = stream.cancel

            def next(self) -> Token:
                token = stream.next()
                return token._replace(log_prob=token.log_prob - 0.3)

        return Stream()


BROKEN = [
    (LosesBytes, "tokenizes"),
    (ScalesEmbeddings, "rows"),
    (CountsCandidates, "repeats"),
    (OrdersCandidates, "repeats"),
    (CountsTexts, "repeats"),
    (Remembers, "repeats"),
    (GivesNan, "repeats"),
    (MixesLabels, "labels"),
    (SpeaksOtherwise, "generates"),
]


@pytest.mark.parametrize(("tampered", "check"), BROKEN)
@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_a_violated_property_is_found(
    case_of: Callable[..., Case], tampered: type[Tampered], check: str, weights: tiny_gguf.Weights
) -> None:
    probes = Probes(tampered(case_of("llama", weights)))  # type: ignore[arg-type]
    holds, detail = getattr(probes, check)()
    assert not holds
    assert detail


# --- files that do not load --------------------------------------------------------------------------------------


def test_a_file_that_does_not_load_fails_with_the_reason_and_skips_the_rest(llama: Case, tmp_path: Path) -> None:
    found = fedbpt.check_model(tiny_gguf.write_truncated(tmp_path / "cut.gguf", llama.path, 0.5))
    assert not found.holds
    assert found.facts is None
    assert [finding.holds for finding in found.findings] == [False, *[None] * (len(CHECKS) - 1)]
    assert "cut.gguf" in found.findings[0].detail


def test_a_split_model_with_a_missing_part_does_not_load(tmp_path: Path) -> None:
    parts = tiny_gguf.write_split(tmp_path, tiny_gguf.LLAMA)
    assert fedbpt.check_model(parts[1], n_threads=1).facts.n_files == 3  # type: ignore[union-attr]
    parts[2].unlink()
    found = fedbpt.check_model(parts[0])
    assert failed(found) == ["loads"]
    assert parts[2].name in found.findings[0].detail


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        fedbpt.check_model(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "setting",
    [
        *({"timeout_s": seconds} for seconds in (0, 0.5, 2**40)),
        *({"n_threads": threads} for threads in (0, "2")),
        *({"gpu": 1}, {"kv_type": "f32"}, {"n_gpu_layers": None}),
    ],
)
def test_an_invalid_setting_is_named(llama: Case, setting: dict[str, Any]) -> None:
    with pytest.raises(InputError) as refused:
        fedbpt.check_model(llama.path, **setting)
    assert next(iter(setting)) in str(refused.value)


def test_a_path_of_any_bytes_is_checked(llama: Case, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    shutil.copyfile(llama.path, path)
    assert fedbpt.check_model(path, n_threads=1).holds
    assert run(str(path), "--threads", "1", "--json") == 0


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the process that tries the model by a shell script."""

    def replace(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(path))

    return replace


@pytest.mark.parametrize("signal", ["SEGV", "ABRT", "FPE", "KILL"])
def test_a_file_that_crashes_its_process_is_reported_with_the_check(
    llama: Case, child: Callable[[str], None], signal: str
) -> None:
    child(
        """echo '{"type":"Begun","name":"loads"}'
        echo '{"type":"Finding","name":"loads","holds":true}'
        echo '{"type":"Begun","name":"tokenizes"}'
        printf 'vocab.cpp:1: GGML_ASSERT(n \\033[31m> 0) failed\\n' >&2
        """
        f"kill -{signal} $$"
    )
    begun: list[str] = []
    found = fedbpt.check_model(llama.path, on_check=begun.append)
    assert begun == ["loads", "tokenizes"]
    assert [finding.holds for finding in found.findings[:3]] == [True, False, None]
    assert f"SIG{signal}" in found.findings[1].detail
    assert "GGML_ASSERT" in found.findings[1].detail
    assert "\033" not in found.findings[1].detail


def test_a_file_that_never_loads_times_out(llama: Case, child: Callable[[str], None]) -> None:
    child("""echo '{"type":"Begun","name":"loads"}'; kill -ALRM $$""")
    found = fedbpt.check_model(llama.path, timeout_s=7)
    assert failed(found) == ["loads"]
    assert "7 s" in found.findings[0].detail


def test_a_process_that_cannot_begin_fails(llama: Case, child: Callable[[str], None]) -> None:
    child("echo no module of this name >&2; exit 3")
    found = fedbpt.check_model(llama.path)
    assert failed(found) == ["loads"]
    assert "no module" in found.findings[0].detail


# --- the command line --------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["models", "check", *arguments])
    return int(ended.value.code or 0)


def test_the_default_output_is_a_table(llama: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(llama.path), "--threads", "1") == 0
    shown = capsys.readouterr().out
    assert llama.scorer.fingerprint[:19] in shown
    assert all(name in shown for name in CHECKS.values())
    assert len(re.findall(r"\bok\b", shown)) == len(CHECKS)
    assert "FAILED" not in shown


def test_json_output_has_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf.write_not_gguf(tmp_path / "page.gguf")
    assert run(str(path), "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["path"], answer["holds"], answer["facts"]) == (str(path), False, None)
    assert [check["name"] for check in answer["checks"]] == list(CHECKS)
    assert "page.gguf" in answer["checks"][0]["detail"]
    assert run(str(path), "--quiet") == 1
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    assert run(str(tmp_path / "none.gguf")) == 2
