"""Custom tasks end to end on the toy model: twenty labels, words of several tokens, pairs, long texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedbpt import Budget, Prompt, PromptSpec, evaluate, tune
from fedbpt.protocol.specs import Template
from fedbpt.tasks import Task, load_task, read_task_rows
from tests.support.toy_scorer import ToyScorer

LETTERS = "abcdefghijklmnopqrst"


def test_twenty_labels_of_which_some_have_words_of_several_tokens(tmp_path: Path) -> None:
    words = tuple(f"{letter}{'zz' * (i % 2)}" for i, letter in enumerate(LETTERS))
    task = Task(
        name="twenty", labels=tuple(LETTERS), templates=(Template(pattern="{text}\nWhich: (", label_words=words),)
    )

    def rows(n: int) -> list[tuple[str, int]]:
        return [(f"{LETTERS[i % 20] * 9} {i}", i % 20) for i in range(n)]

    scorer = ToyScorer()
    budget = Budget(evaluations=8 * 10)
    result = tune(scorer, task, rows(120), budget=budget, prompt=PromptSpec(d=6, alpha=2.0), popsize=8)
    assert result.prompt.layer_readout is not None
    assert result.prompt.layer_readout.weights.shape[2:] == (scorer.n_embd, 20)
    held_out = [(text + "!", label) for text, label in rows(60)]
    before, after = evaluate(scorer, task, held_out), evaluate(scorer, task, held_out, result.prompt)
    assert before.accuracy < 0.2
    assert after.accuracy > before.accuracy + 0.3
    again = Prompt.load(result.prompt.save(tmp_path / "p.safetensors"))
    assert np.array_equal(evaluate(scorer, task, held_out, again).predictions, after.predictions)


def test_pairs_from_a_task_file_of_long_texts_keep_template_and_cue(tmp_path: Path) -> None:
    (tmp_path / "nli.toml").write_text("""
name = "nli"
labels = ["no", "yes"]
max_text_tokens = 24
text_columns = ["{premise} So: {hypothesis}"]
[[templates]]
pattern = "Claim: {text}\\nTrue: ("
label_words = ["n", "yes"]
""")
    task = load_task(tmp_path / "nli.toml")
    lines = [f"it rains {'very ' * (i % 3)}hard,it is {'wet' if i % 2 else 'dry'},{i % 2}" for i in range(12)]
    (tmp_path / "nli.csv").write_text("\n".join(["premise,hypothesis,label", *lines]))
    rows = read_task_rows(task, tmp_path / "nli.csv")
    assert rows[1] == ("it rains very hard So: it is wet", 1)
    scorer = ToyScorer(n_ctx=24 + len("Claim: \nTrue: (") + 1 + len("ye"))  # as long as the longest may become
    result = tune(scorer, task, rows, budget=Budget(evaluations=16), prompt=PromptSpec(d=4), popsize=8)
    assert evaluate(scorer, task, rows, result.prompt).n == 12
