"""A device fits and evaluates readouts of several templates."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.device.device import Device
from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.objective.losses import LOSSES
from fedbpt.objective.mini_batches import rows_together
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import loss_and_gradient, moments, word_ids
from fedbpt.protocol.rounds import FitWork
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout, Template
from fedbpt.tasks.rows import spread
from fedbpt.tasks.task import label_word_ids, render_ids
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.unit.device.test_device import LABELS, PROMPT, ROWS, TASK, TEMPLATE, device, plan, request, through_the_wire
from tests.unit.device.test_local_fit import LATENT, N_WORDS, SPEC, rows_of

OTHERS = (
    Template(pattern="Review: {text}\nIt was: (", label_words=("d", "f")),
    Template(pattern="{text}\n(", label_words=("bad", "good")),  # of several tokens, and a cue of two
)
FRONT = PromptSpec(placement="front", n_prompt=3, d=6, seed=1, alpha=2.0)
both_places = pytest.mark.parametrize("prompt", [PROMPT, FRONT], ids=["cue", "front"])


def weights(n_words: int = N_WORDS, seed: int = 0) -> np.ndarray:
    """V of each template [1 + len(OTHERS), 1 + n_words, 2], as sent over the wire."""
    made = np.random.default_rng(seed).standard_normal((1 + len(OTHERS), 1 + n_words, 2))
    return made.astype(np.float32).astype(np.float64)


def readout(n_words: int = N_WORDS, seed: int = 0, n_others: int = len(OTHERS)) -> Readout:
    own, *others = (Array.of(v, "<f4") for v in weights(n_words, seed))
    return Readout(weights=own, others=tuple(others[:n_others]))


def fit(**changes: Any) -> FitWork:
    made = FitWork(
        purpose="readout", latent=Array.of(LATENT), n_words=N_WORDS, readout=readout(), others=OTHERS, max_rows=12
    )
    return msgspec.structs.replace(made, **changes)


def asked(prompt: PromptSpec = PROMPT, **changes: Any) -> Any:
    """A plan of a fit; ``changes``: of the work."""
    return plan(fit(**changes), objective=SPEC, prompt=prompt)


def plain_logits(prompt: PromptSpec, rows: list[tuple[str, int]], latent: np.ndarray = LATENT) -> list[np.ndarray]:
    """Logits [n, 2 + N_WORDS] of each template: its label words, then the random words of the first template."""
    scorer, found = ToyScorer(), []
    words = word_ids(scorer.n_vocab, N_WORDS, prompt.seed, np.concatenate(label_word_ids(scorer, TEMPLATE, LABELS)))
    embeds = Objective(scorer, TEMPLATE, LABELS, ROWS, SPEC, prompt).embeds(latent[None])
    for template in (TEMPLATE, *OTHERS):
        rows_of_template = []
        for text, _ in rows:
            ids = render_ids(scorer, template, text)
            if template is not TEMPLATE:  # as it stands, without a prompt
                place: Any = ([ids], np.zeros((1, 0, 8)), "front", None)
            elif prompt.placement == "front":
                place = ([ids[1:]], embeds, "front", ids[:1])
            else:
                place = ([ids], embeds, "cue", None)
            tokens, rows_in, where, prefix = place
            labels = [list(word.encode()) for word in template.label_words]
            if all(len(word) == 1 for word in labels):
                one_each = np.concatenate(labels)
                own = scorer.score_with_soft_prompt(tokens, rows_in, one_each, where, prefix)[0, 0]
            else:
                own = scorer.log_probabilities(tokens, rows_in, [labels], where, prefix)[0, 0]
            other = scorer.score_with_soft_prompt(tokens, rows_in, words, where, prefix)[0, 0]
            rows_of_template.append(np.concatenate([own, other]))
        found.append(np.stack(rows_of_template).astype(np.float64))
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --- a fit ---------------------------------------------------------------------------------------------------------


@both_places
@pytest.mark.parametrize("n_words", [0, 2, N_WORDS])
def test_a_gradient_is_that_of_each_template_the_others_without_the_prompt(prompt: PromptSpec, n_words: int) -> None:
    centres = np.random.default_rng(3).standard_normal((3, n_words)).astype(np.float32)
    report = device().run(asked(prompt, n_words=n_words, readout=readout(n_words), centre=Array.of(centres.ravel())))
    rows = [ROWS[i] for i in rows_of()]
    targets = np.array([label for _, label in rows])
    found = [
        loss_and_gradient(own, targets, v, centre)
        for own, v, centre in zip(plain_logits(prompt, rows), weights(n_words), centres, strict=True)
    ]
    assert report.result.loss == pytest.approx(np.mean([loss for loss, _ in found]), rel=1e-5)
    assert report.result.means.shape == (3, 1 + n_words, 2)
    np.testing.assert_allclose(report.result.means.numpy(), [g for _, g in found], rtol=2e-3, atol=1e-4)
    assert (report.n_texts, report.evaluations) == (12, 0)


@both_places
def test_moments_are_those_of_each_templates_words(prompt: PromptSpec) -> None:
    report = device().run(asked(prompt, readout=None))
    found = plain_logits(prompt, [ROWS[i] for i in rows_of()])
    np.testing.assert_allclose(report.result.means.numpy(), [moments(own[:, 2:]) for own in found], rtol=1e-4)
    assert report.result.means.shape == (3, 1 + N_WORDS)


def test_rows_of_all_templates_are_scored_once_for_all_exchanges_of_a_fit() -> None:
    mine, single = device(), device()
    first = mine.run(asked(readout=None))
    assert first.tokens > single.run(asked(readout=None, others=())).tokens
    calls = len(mine.scorer.calls)
    later = [mine.run(asked(readout=readout(seed=seed))) for seed in range(3)]
    assert [report.tokens for report in later] == [0, 0, 0]
    assert len(mine.scorer.calls) == calls
    assert len({report.result.loss for report in later}) == 3


@pytest.mark.parametrize(
    "changes",
    [{"others": OTHERS[::-1]}, {"others": OTHERS[:1], "readout": readout(n_others=1)}, {"latent": Array.of(-LATENT)}],
    ids=["another order", "fewer", "another prompt"],
)
def test_rows_under_other_templates_are_not_confused(changes: dict[str, Any]) -> None:
    busy = device()
    before = busy.run(asked())
    assert busy.run(asked(**changes)).result == device().run(asked(**changes)).result != before.result
    assert busy.run(asked()).result == before.result


def test_the_other_templates_count_as_forward_tokens() -> None:
    report = device().run(asked(readout=None))
    expected = device().run(asked(readout=None, others=())).tokens
    for template in OTHERS:
        other = Objective(ToyScorer(), template, LABELS, ROWS, SPEC, PROMPT)
        other.logits(other.zero_shot_embeds(), rows_of())
        expected += other.tokens
    assert report.tokens == expected


def test_label_weights_weigh_the_rows_of_every_template() -> None:
    weighted = msgspec.structs.replace(asked(), label_weights=(3.0, 0.5))
    report = device().run(weighted)
    rows = [ROWS[i] for i in rows_of()]
    targets = np.array([label for _, label in rows])
    given = zip(plain_logits(PROMPT, rows), weights(), strict=True)
    found = [loss_and_gradient(own, targets, v, None, np.array([3.0, 0.5])[targets]) for own, v in given]
    assert report.result.loss == pytest.approx(np.mean([loss for loss, _ in found]), rel=1e-5)
    np.testing.assert_allclose(report.result.means.numpy(), [g for _, g in found], rtol=2e-3, atol=1e-4)


def test_the_same_plan_gives_the_same_result_whatever_ran_before() -> None:
    busy, fresh = device(), device()
    for work in (fit(others=(), readout=readout(n_others=0)), fit(readout=None), fit(latent=Array.of(-LATENT))):
        busy.run(plan(work, objective=SPEC))
    again = busy.run(asked()), busy.run(asked()), fresh.run(through_the_wire(asked()))
    assert again[0].result == again[1].result == again[2].result


@pytest.mark.parametrize("stops_after", range(3))
def test_after_cancelling_between_templates_the_next_try_is_complete(stops_after: int) -> None:
    mine, polls = device(), iter([False] * stops_after + [True])
    with pytest.raises(ScoringInterrupted):
        mine.run(asked(), cancelled=lambda: next(polls))
    assert mine.run(asked()).result == device().run(asked()).result


def test_progress_never_ends_before_the_last_rows_and_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    scorer = ToyScorer()
    many = 2 * rows_together(scorer)
    busy = Device("pi5", scorer, [ROWS[i % len(ROWS)] for i in range(many)], ROWS, ROWS, task=TASK)
    busy.run(asked(max_rows=many), lambda done, total: seen.append((done, total)))
    assert len(seen) > 2
    assert all(done < total for done, total in seen[:-1])
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"others": ()}, ("3", "1")),
        ({"readout": readout(n_others=1)}, ("2", "3")),
        ({"centre": Array.of(np.zeros(N_WORDS))}, ("[18]",)),
        ({"others": (OTHERS[0], Template(pattern="{text}:", label_words=("x",)))}, ()),
        ({"others": (OTHERS[0], Template(pattern="text:", label_words=("x", "y")))}, ("{text}",)),
    ],
    ids=["no others", "too few readouts", "one centre", "other labels", "no text"],
)
def test_an_inconsistent_fit_is_refused(changes: dict[str, Any], values: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        device().run(asked(**changes))
    assert [value for value in values if value not in str(caught.value)] == []


# --- which words ---------------------------------------------------------------------------------------------------


def test_all_templates_have_the_words_of_the_first_though_their_label_words_differ() -> None:
    spec, scorer = ObjectiveSpec(readout_words=200), ToyScorer()
    first = Objective(scorer, TEMPLATE, LABELS, ROWS, spec, PROMPT)
    as_its_own = Objective(scorer, OTHERS[0], LABELS, ROWS, spec, PROMPT)
    assert as_its_own.word_ids.tolist() != first.word_ids.tolist()  # which the others must not take
    mine = device()
    work = fit(n_words=200, readout=None, others=OTHERS[:1])
    report = mine.run(plan(work, objective=spec))
    words = Objective(scorer, OTHERS[0], LABELS, ROWS, spec, PROMPT, words=first.word_ids)
    logits = words.logits(words.zero_shot_embeds(), rows_of())[:, 2:].astype(np.float64)
    np.testing.assert_allclose(report.result.means.numpy()[1], moments(logits), rtol=1e-5)


# --- an evaluation -------------------------------------------------------------------------------------------------


@both_places
@pytest.mark.parametrize("loss", ["cross_entropy", "hinge"])
def test_an_evaluation_averages_the_log_probabilities_of_all_templates(prompt: PromptSpec, loss: Any) -> None:
    spec = ObjectiveSpec(loss=loss, readout_words=N_WORDS)
    ask = request(
        objective=spec,
        prompt=prompt,
        latents=Array.of(LATENT[None]),
        readouts=(readout(),),
        others=OTHERS,
        split="test",
    )
    found = device().evaluate(through_the_wire(ask))
    rows = ROWS[3:10]
    targets = np.array([label for _, label in rows])
    each = [
        log_softmax(own[:, :2] + v[0] + own[:, 2:] @ v[1:])
        for own, v in zip(plain_logits(prompt, rows), weights(), strict=True)
    ]
    average = np.mean(each, axis=0)
    assert found.n == len(rows)
    assert found.correct == ((average.argmax(axis=1) == targets).sum(),)
    assert found.loss_sums[0] == pytest.approx(LOSSES[loss](average, targets).sum(), rel=1e-5)


@pytest.mark.parametrize("prompt", [PROMPT, FRONT], ids=["cue", "front"])
def test_latents_with_and_without_others_are_evaluated_as_if_separate(prompt: PromptSpec) -> None:
    latents = np.stack([np.zeros(6), LATENT, LATENT, np.zeros(6), LATENT])
    readouts = (None, readout(), readout(n_others=0), readout(2, seed=4), None)

    def ask(which: list[int], **changes: Any) -> Any:
        chosen = tuple(readouts[i] for i in which)
        return device().evaluate(
            request(objective=SPEC, prompt=prompt, latents=Array.of(latents[which]), readouts=chosen, **changes)
        )

    together = ask([0, 1, 2, 3, 4], others=OTHERS)
    for i, own in enumerate(readouts):
        separate = ask([i], others=OTHERS if own is not None and own.others else ())
        assert together.correct[i] == separate.correct[0]
        assert together.loss_sums[i] == pytest.approx(separate.loss_sums[0], rel=1e-9)
    assert len(set(together.loss_sums)) == 5


def test_other_templates_without_a_readout_change_nothing() -> None:
    plain = request(objective=SPEC, latents=Array.of(LATENT[None]), readouts=(readout(n_others=0),))
    with_others = msgspec.structs.replace(plain, others=OTHERS)
    one, other = (device().evaluate(ask) for ask in (plain, with_others))
    assert (one.n, one.correct, one.loss_sums) == (other.n, other.correct, other.loss_sums)


def test_a_limit_takes_the_same_rows_under_every_template() -> None:
    ask = request(
        objective=SPEC, latents=Array.of(LATENT[None]), readouts=(readout(),), others=OTHERS, split="dev", max_rows=2
    )
    found = device().evaluate(ask)
    rows = [ROWS[i] for i in spread(6, 2)]
    weighed = zip(plain_logits(PROMPT, rows), weights(), strict=True)
    each = [log_softmax(own[:, :2] + v[0] + own[:, 2:] @ v[1:]) for own, v in weighed]
    average = log_softmax(np.mean(each, axis=0))
    assert found.n == 2
    assert found.loss_sums[0] == pytest.approx(-average[0, rows[0][1]] - average[1, rows[1][1]], rel=1e-5)


@pytest.mark.parametrize("given", [(), OTHERS[:1], (*OTHERS, OTHERS[0])], ids=["none", "too few", "too many"])
def test_a_readout_of_missing_templates_is_refused(given: tuple[Template, ...]) -> None:
    ask = request(
        objective=SPEC, latents=Array.of(np.stack([LATENT, LATENT])), readouts=(None, readout()), others=given
    )
    with raises(InputError) as caught:
        device().evaluate(ask)
    assert f" {len(given)}" in str(caught.value)


def test_an_evaluation_of_many_rows_takes_each_rows_own_logits() -> None:
    many = [(f"text {i} {'ugly' * (i % 3)}", i % 2) for i in range(150)]  # more than a scoring call
    objective = Objective(ToyScorer(), TEMPLATE, LABELS, many, SPEC, PROMPT)
    objective.readout = readout(n_others=1)
    other = Objective(ToyScorer(), OTHERS[0], LABELS, many, SPEC, PROMPT, words=objective.word_ids)
    logits = other.logits(other.zero_shot_embeds(), np.arange(150))
    embeds, shuffled = objective.embeds(LATENT[None]), np.random.default_rng(0).permutation(150)
    straight = objective.evaluate(embeds, others=[logits])
    mixed = objective.evaluate(embeds, shuffled, others=[logits[shuffled]])
    assert (mixed.predictions[0] == straight.predictions[0][shuffled]).all()
    assert mixed.loss_sums[0] == pytest.approx(straight.loss_sums[0], rel=1e-9)
    assert mixed.correct == straight.correct


def test_a_cancelled_evaluation_of_other_templates_is_interrupted() -> None:
    ask = request(objective=SPEC, latents=Array.of(LATENT[None]), readouts=(readout(),), others=OTHERS)
    mine, polls = device(), iter([False, True])
    with pytest.raises(ScoringInterrupted):
        mine.evaluate(ask, cancelled=lambda: next(polls))
    assert mine.evaluate(ask).correct == device().evaluate(ask).correct
