"""Model cards: known facts are stated, unknown ones are omitted."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

import fedbpt
from fedbpt import Budget, ObjectiveSpec, Prompt, PromptSpec, TuneResult, cli, models, tune
from fedbpt.api import make_prompt
from fedbpt.cli import chat as chat_command
from fedbpt.cli import evaluate as evaluate_command
from fedbpt.prompts.model_card import PLACES, known_model, model_card
from fedbpt.prompts.prompt import card_path
from fedbpt.protocol.specs import Array, PrivacySpec, Template
from fedbpt.runs.intervals import wilson_interval
from fedbpt.runs.result import VARIANTS, Score, Shipped
from tests.support.printed import blocks, commands
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, TASK_FILE, rows
from tests.unit.prompts.test_prompt import OTHERS, READOUT, make, of_layers


@pytest.fixture(scope="module")
def result() -> TuneResult:
    return tune(ToyScorer(), TASK, rows(24), budget=Budget(evaluations=32), prompt=PromptSpec(d=6))


def card(prompt: Prompt) -> str:
    return model_card(prompt, "USE\n")


def front_matter(text: str) -> dict[str, Any]:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_saving_writes_the_card_next_to_the_prompt(tmp_path: Path) -> None:
    saved = make().save(tmp_path / "p.safetensors")
    text = card_path(saved).read_text()
    assert "# mood: a soft prompt for toy" in text
    assert 'fedbpt.Prompt.load("p.safetensors")' in text


@pytest.mark.parametrize("known", [True, False])
def test_commands_and_code_of_the_card_run(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (fedbpt, evaluate_command, chat_command):
        monkeypatch.setattr(module, "load_model", lambda *_args, **_options: ToyScorer())
    task = TASK if known else None
    saved = make(task_name=TASK.name, labels=TASK.labels, template=TASK.templates[0], task=task).save("my prompt.st")
    (tmp_path / "task.toml").write_text(TASK_FILE)
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(8)))
    monkeypatch.setattr("sys.stdin", io.StringIO("zzz\n"))
    console, python = blocks(card_path(saved).read_text().partition("## Use")[2])
    ran = [shlex.split(command) for _, command in commands(console)]
    assert [words[:2] for words in ran] == [["fedbpt", "evaluate"], ["fedbpt", "chat"]]
    for words in ran:
        with pytest.raises(SystemExit) as ended:
            cli.main(words[1:])
        assert ended.value.code == 0, words
    exec(python.text, {})


def test_it_says_how_long_texts_may_be_and_which_columns_data_files_have() -> None:
    task = msgspec.structs.replace(TASK, max_words=7, text_columns=("body", "{a} {b}"), label_column="mood")
    fields: dict[str, Any] = {"task_name": task.name, "labels": task.labels, "template": task.templates[0]}
    text = card(make(**fields, task=task))
    for value in ("7 words", "128 tokens", "`body` or `{a} {b}`", "`mood`"):
        assert value in text
    assert "tokens" not in card(make(**fields)).partition("## Task")[2].partition("## Use")[0]


def test_it_says_for_which_model_and_task_the_prompt_is() -> None:
    prompt = make()
    text = card(prompt)
    assert f"`{prompt.model_fingerprint}`" in text
    assert "2 row(s) of 8 numbers" in text
    assert PLACES["cue"].format(n=2) in text
    assert "{text}\nMood:" in text
    assert '| good | `" good"` |' in text
    assert "readout" not in text
    assert front_matter(text)["pipeline_tag"] == "text-classification"


def test_it_describes_readout_and_other_templates() -> None:
    text = card(make(**READOUT))
    assert "by the logits of 3 words" in text
    assert "averaged" not in text
    other = OTHERS["others"][0].pattern
    assert other in card(make(**OTHERS))


def test_it_names_the_layers_and_templates_that_labels_are_read_from() -> None:
    text = card(make(**of_layers()))
    assert "after layers 3, 5 (counted from 0)" in text
    own, other = make().template.pattern, OTHERS["others"][0].pattern
    assert f"With the prompt:\n\n```\n{own}\n```" in text
    assert f"Without the prompt:\n\n```\n{other}\n```" in text
    assert "label words count too, in 1 of these texts" in text
    assert "likeliest continuation" not in text
    assert '| good | `" good"` |' in text


def test_it_says_that_label_words_do_not_count() -> None:
    text = card(make(**of_layers(word_scales=Array.of(np.zeros(2), "<f4"))))
    assert "Label words do not count. The labels: bad, good." in text
    assert '`" good"`' not in text


def test_a_template_that_is_not_read_is_not_named() -> None:
    weights = np.ones((2, 2, 8, 2))
    weights[1] = 0
    text = card(make(**of_layers(weights=Array.of(weights, "<f2"))))
    assert OTHERS["others"][0].pattern not in text
    assert "Without the prompt" not in text


@pytest.mark.parametrize(
    ("shipped", "without"), [("calibrated", True), ("probe", True), ("prompt", False), ("read", False)]
)
def test_it_says_which_line_the_file_holds_and_whether_it_has_a_prompt(shipped: Shipped, without: bool) -> None:
    data = (rows(40), rows(20, 200), rows(20, 400))
    spec = PromptSpec(d=6, placement="front")
    run = tune(ToyScorer(), TASK, *data, budget=Budget(evaluations=16), prompt=spec, popsize=8, show=False).run
    names = {"zero_shot", "calibrated", "probe", "prompt", "read", "tuned"}
    assert set(run.scores("test")) == names == set(VARIANTS)
    prompt = make_prompt(ToyScorer(), TASK, msgspec.structs.replace(run, shipped=shipped))
    text = card(prompt)
    assert prompt.history[-1]["shipped"] == shipped
    for name, score in run.scores("test").items():
        assert f"| {VARIANTS[name]} | {score.accuracy:.3f} |" in text
    assert f'This file holds the line "{VARIANTS[shipped]}", which held-out training rows chose.' in text
    assert ("without a prompt" in text) is without
    assert ("a soft prompt for toy" in text) is not without
    assert ("With the prompt:" in text) is (shipped == "read")
    changed = prompt.with_rows(prompt.rows + 1, ())  # trained further: what the run chose says nothing about it
    assert "a soft prompt for toy" in card(changed)


def test_it_states_how_the_prompt_was_trained(result: TuneResult) -> None:
    text = card(result.prompt)
    for title, value in (("method", "pooled"), ("evaluations", "32"), ("devices", "1"), ("seed", "0")):
        assert f"| {title} | {value} |" in text
    assert f"| forward tokens | {result.run.tokens:,} |" in text
    assert f"| digest of the search | {result.run.digest} |" in text


def test_results_are_stated_with_their_intervals(result: TuneResult) -> None:
    assert "Results" not in card(result.prompt)  # nothing was held back
    zero_shot, tuned = Score(n=40, correct=20, loss_sum=30.0), Score(n=40, correct=31, loss_sum=20.0)
    measured = msgspec.structs.replace(result.run, zero_shot=zero_shot, tuned=tuned)
    text = card(make_prompt(ToyScorer(), TASK, measured))
    low, high = wilson_interval(31, 40)
    assert f"| tuned | 0.775 | {low:.3f} – {high:.3f} | 40 |" in text
    assert "| zero-shot | 0.500 |" in text


@pytest.mark.parametrize(
    ("settings", "told", "untold"),
    [
        ({"robust": "median", "byzantine": 2}, ["| robust aggregation | median |", "tolerated | 2 |"], "privacy"),
        (
            {
                "privacy": PrivacySpec(clip=0.3, noise_multiplier=2.0),
                "calibrate": False,
                "objective": ObjectiveSpec(readout_words=0),
            },
            ["clip, nats | 0.3 |", "noise multiplier | 2 |", "δ | 1e-05 |", "device | 1.25 |"],
            "robust",
        ),
    ],
)
def test_privacy_and_robust_settings_are_stated(
    result: TuneResult, settings: dict[str, Any], told: list[str], untold: str
) -> None:
    run = msgspec.structs.replace(
        result.run,
        settings=msgspec.structs.replace(result.run.settings, **settings),
        epsilon=1.25 if "privacy" in settings else None,
        fits={},
        others=(),
    )
    text = card(make_prompt(ToyScorer(), TASK, run))
    assert [line for line in told if line not in text] == []
    assert untold not in text


def test_unknown_facts_are_omitted() -> None:
    text = card(make(history=()))
    assert "Training" not in text
    assert "Results" not in text
    assert "None" not in text
    assert "licence:" not in text
    assert "base_model" not in front_matter(text)


def test_a_model_of_the_catalogue_has_its_licence_and_origin_but_not_a_file_that_only_bears_its_name() -> None:
    entry = models.CATALOGUE["smollm2-135m"]
    assert isinstance(entry.source, models.PackagedFile)
    known = make(model_name=entry.name, model_fingerprint=f"sha256:{entry.source.sha256}")
    assert front_matter(card(known))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "licence: Apache-2.0." in card(known)
    renamed = make(model_name=entry.name)
    assert known_model(renamed.model_name, renamed.model_fingerprint) is None
    assert "base_model" not in front_matter(card(renamed))


def test_a_prompt_of_target_texts_has_perplexities() -> None:
    prompt = make(
        labels=(),
        label_bias=None,
        template=Template(pattern="{text}\nAnswer:", label_words=()),
        history=({"zero_shot_perplexity": 30.0, "zero_shot_n": 5, "tuned_perplexity": 12.5, "tuned_n": 5},),
    )
    text = card(prompt)
    assert "| tuned | 12.500 |  | 5 |" in text
    assert front_matter(text)["pipeline_tag"] == "text-generation"


@pytest.mark.parametrize("name", ['quo"ted', "a: b", "with | bar", "naïve — ü"])
def test_odd_names_break_neither_table_nor_front_matter(name: str) -> None:
    text = card(make(model_name=name, labels=("bad", name)))
    assert front_matter(text)["library_name"] == "fedbpt"
    line = next(line for line in text.splitlines() if line.startswith("| name |"))
    assert line == f"| name | {name.replace('|', chr(92) + '|')} |"
