"""Runs whose prompts shift layers, on tiny models: `fedbpt.tune`, prompt files, evaluation, generation, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.raises import raises
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.api import TuneResult, evaluate, tune
from fedbpt.engine.layers import middle_layer, shift_sizes
from fedbpt.engine.text_generator import Sampling
from fedbpt.errors import ConfigError, PromptError
from fedbpt.exchange import export_prompt
from fedbpt.objective.layer_view import LayerView
from fedbpt.objective.objective import Objective
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import ObjectiveSpec, PrivacySpec, PromptSpec, Template
from fedbpt.runs.settings import RunSettings
from fedbpt.side_by_side.sides import SideBySide
from fedbpt.tasks import Task

PATTERNS = ("{text}\nIt is", "{text} so")
LABELLED = Task(
    name="mood",
    labels=("bad", "good"),
    templates=tuple(Template(pattern=pattern, label_words=(" a", " b")) for pattern in PATTERNS),
)
TARGETS = Task(name="echo", templates=tuple(Template(pattern=pattern, label_words=()) for pattern in PATTERNS))
LABELLED_ROWS = [(f"text {i} {'ugly' * (i % 2)}", i % 2) for i in range(16)]
TARGET_ROWS = [(f"text {i}", f" {i % 3} abc") for i in range(16)]


@pytest.fixture(scope="module", params=["layer", "layers"])
def placement(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tuned(case: Case, placement: Any, task: Task, rows: list[Any], **changes: Any) -> TuneResult:
    given = {"budget": fedbpt.Budget(evaluations=24), "popsize": 8, "test": rows[:6], "show": False, **changes}
    spec = PromptSpec(placement=placement, d=6, alpha=4.0)
    return tune(fedbpt.load_model(case.path, n_threads=N_THREADS), task, rows, prompt=spec, **given)


@pytest.fixture(scope="module")
def targets(llama: Case, placement: str) -> TuneResult:
    return tuned(llama, placement, TARGETS, TARGET_ROWS)


def test_the_selection_measures_the_layers_that_are_shifted(llama: Case, placement: Any, targets: TuneResult) -> None:
    shift = targets.run.shift
    assert shift is not None
    n_layer = llama.scorer.n_layer
    assert shift.layers == ((middle_layer(n_layer),) if placement == "layer" else tuple(range(n_layer)))
    view = LayerView(llama.scorer, targets.run.template, (), 128, tuple(range(n_layer)))
    states, _ = view.read([text for text, _ in TARGET_ROWS])
    expected = shift_sizes(states, placement)[list(shift.layers)]
    np.testing.assert_allclose(shift.sizes, expected, rtol=0.02)
    assert targets.prompt.rows.shape == (len(shift.layers), llama.scorer.n_embd)


def test_a_typical_shift_has_alpha_times_the_measured_size(llama: Case, targets: TuneResult) -> None:
    shift = targets.run.shift
    assert shift is not None
    spec = PromptSpec(placement="layers", d=400, alpha=0.5).shifting(shift)
    made = Objective(llama.scorer, targets.run.template, (), TARGET_ROWS[:1], ObjectiveSpec(loss="nll"), spec)
    rows = made.embeds(np.random.default_rng(0).standard_normal((8, 400)))
    np.testing.assert_allclose(rows.std(axis=(0, 2)), 0.5 * np.array(shift.sizes), rtol=0.2)
    assert not made.embeds(np.zeros((1, 400))).any()


def test_a_saved_prompt_evaluates_as_the_run_did(llama: Case, targets: TuneResult, tmp_path: Path) -> None:
    prompt = Prompt.load(targets.prompt.save(tmp_path / "p.safetensors"))
    assert prompt == targets.prompt
    header = prompt.to_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["fedbpt"].startswith(
        '{"format":4,'
    )
    found = evaluate(llama.scorer, TARGETS, TARGET_ROWS[:6], prompt)
    assert found.loss == pytest.approx(targets.run.tuned.loss, abs=1e-4)
    assert found.loss != pytest.approx(targets.run.zero_shot.loss, abs=1e-3)


def test_what_is_generated_has_the_likelihood_that_tuning_scores(llama: Case, targets: TuneResult) -> None:
    prompt = targets.prompt
    pieces = list(SideBySide(llama.scorer, prompt, TARGETS).generation("text 3", "tuned", Sampling(), 5))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    assert len(tokens) == 5
    spec = ObjectiveSpec(loss="nll")
    made = Objective(llama.scorer, prompt.template, (), [("text 3", "x")], spec, prompt.spec)
    made._answers = [[np.array([token.id for token in tokens], dtype=np.int32)]]
    made._plan = made._compile(np.arange(1), made._tokens, keep_kv=False)
    loss = made.evaluate(prompt.rows[None]).loss_sums[0]
    assert loss == pytest.approx(-sum(token.log_prob for token in tokens) / 5, abs=1e-3)
    unshifted = list(SideBySide(llama.scorer, prompt, TARGETS).generation("text 3", "original", Sampling(), 5))
    assert [piece.token for piece in unshifted] != [piece.token for piece in pieces]


def test_the_same_run_gives_the_same_prompt_bit_for_bit(llama: Case, placement: str, targets: TuneResult) -> None:
    again = tuned(llama, placement, TARGETS, TARGET_ROWS)
    assert again.run.digest == targets.run.digest
    assert again.prompt == targets.prompt


def test_a_run_goes_on_where_it_was(llama: Case, placement: str, targets: TuneResult, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    first = tuned(llama, placement, TARGETS, TARGET_ROWS, store=store, budget=fedbpt.Budget(evaluations=8))
    whole = tuned(llama, placement, TARGETS, TARGET_ROWS, store=store)
    assert first.run.rounds < whole.run.rounds
    assert whole.run.digest == targets.run.digest


def test_labels_are_read_under_a_shift(llama: Case, placement: str) -> None:
    found = tuned(llama, placement, LABELLED, LABELLED_ROWS)
    assert {"probe", "prompt", "read"} <= set(found.run.scores("test"))
    words = tuned(llama, placement, LABELLED, LABELLED_ROWS, readout="words")
    assert words.run.shipped == ""
    result = evaluate(llama.scorer, LABELLED, LABELLED_ROWS[:6], words.prompt)
    assert result.loss == pytest.approx(words.run.tuned.loss, abs=1e-4)


def test_peft_has_no_place_for_a_shift(llama: Case, targets: TuneResult, tmp_path: Path) -> None:
    with raises(PromptError, field="placement"):
        export_prompt(targets.prompt, tmp_path / "a", "peft", scorer=llama.scorer, task=TARGETS, base_model="x")


def test_privacy_refuses_a_shift(placement: Any) -> None:
    with raises(ConfigError, field="placement"):
        RunSettings(
            rounds=1,
            prompt=PromptSpec(placement=placement),
            privacy=PrivacySpec(clip=1.0, noise_multiplier=1.0),
            calibrate=False,
            balanced=False,
            objective=ObjectiveSpec(readout_words=0),
        )
