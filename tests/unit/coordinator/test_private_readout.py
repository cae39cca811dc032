"""Private runs with a readout: noisy sums once a run, by devices that refuse a second one; ε, results, resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import evaluate
from fedbpt.api import make_prompt
from fedbpt.coordinator import federation
from fedbpt.coordinator.costs.estimate import estimate
from fedbpt.device.device import Device
from fedbpt.device.privacy_limit import PrivacyLimit
from fedbpt.device.state import DeviceState
from fedbpt.device.state_file import kept_state
from fedbpt.engine.noisy_means import FEWEST_COMPONENTS
from fedbpt.errors import (
    ConfigError,
    FederationError,
    InputError,
    QuorumError,
    ScoringInterrupted,
    StoreError,
    WireError,
)
from fedbpt.objective.privacy import Releases, epsilon
from fedbpt.prompts.model_card import model_card
from fedbpt.protocol import codec
from fedbpt.protocol.names import SUM
from fedbpt.protocol.rounds import (
    HeldRows,
    LocalWork,
    MeansResult,
    MeansWork,
    PooledWork,
    PublicResult,
    PublicWork,
    RoundPlan,
    RoundReport,
    SearchState,
    SecureUse,
    SelectWork,
    Work,
)
from fedbpt.protocol.specs import Array, LayerReadout, ObjectiveSpec, PrivacySpec, PromptSpec
from fedbpt.runs.events import RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.secure.membership import Membership
from fedbpt.secure.sizes import ATTEMPTS
from fedbpt.tasks.rows import LabelIndex
from tests.support.raises import raises
from tests.support.toy_scene import D, Scene, StopRunError, closed, settings, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.coordinator.test_layer_runs import LONG, LayerScene, SpyDevice

pytestmark = pytest.mark.slow
pytest.importorskip("dp_accounting")

SPEC = PrivacySpec(readout_noise=0.7)
STATE = SearchState(mean=Array.of(np.zeros(D), "<f4"), sigma=1.0)
LITTLE = PrivacySpec(readout_noise=1e-3)  # to see what a run makes of almost exact sums


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LayerScene]]:
    scenes: list[LayerScene] = []

    def made(*args: Any, **options: Any) -> LayerScene:
        scenes.append(LayerScene(tmp_path / f"{len(scenes)}.sqlite", *args, **options))
        return scenes[-1]

    yield made
    for scene in scenes:
        scene.store.close()


@pytest.fixture
def scene(make: Callable[..., LayerScene]) -> LayerScene:
    return make()


def run(scene: LayerScene, name: str = "r", **changes: Any) -> RunResult:
    return scene.run(name, **{"privacy": SPEC, **changes})


def plans(scene: LayerScene, kind: type[Any]) -> list[RoundPlan]:
    return [plan for device in scene.devices.values() for plan in device.plans if isinstance(plan.work, kind)]


# --- the whole run -----------------------------------------------------------------------------------------------


def test_a_private_run_sends_noisy_sums_once_and_nothing_else_of_rows(scene: LayerScene) -> None:
    result = run(scene)
    assert scene.purposes() == ["probe"]
    assert {type(plan.work) for device in scene.devices.values() for plan in device.plans} == {PublicWork, MeansWork}
    assert len(plans(scene, MeansWork)) == 2
    train = {text for device in scene.devices.values() for text, _ in device._rows["train"]}
    for device in scene.devices.values():
        assert not device.scored["PublicWork"] & train
        assert {request.split for request in device.requests} <= {"dev", "test"}
    assert (result.shipped, result.rounds, result.evaluations) == ("probe", 0, 0)
    assert isinstance(result.readout, LayerReadout)
    assert not result.latent.any()
    assert set(result.scores("test")) == {"zero_shot", "probe", "tuned"}
    assert result.tuned == result.baselines["probe"]


def test_almost_exact_sums_give_the_classifier_of_all_rows_in_one_place(make: Callable[..., LayerScene]) -> None:
    apart, together = make({"a": rows(24), "b": rows(24, 50)}), make({"a": rows(24) + rows(24, 50)})
    found = [run(scene, privacy=LITTLE, test_rows=3).layer_fits["probe"] for scene in (apart, together)]
    one, other = (each.weights.numpy().ravel() for each in found)
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


def test_epsilon_is_that_of_one_release_however_many_devices_and_rows(scene: LayerScene) -> None:
    result = run(scene)
    told = [event.epsilon for event in scene.of(RoundClosed)]
    assert told == [0.0, epsilon(SPEC, [], 1)]
    assert result.epsilon == told[-1]
    assert told[-1] == pytest.approx(epsilon(PrivacySpec(noise_multiplier=0.7), [(1.0, 1)]))
    infos = [device.info() for device in scene.devices.values()]
    chosen = settings(privacy=SPEC, calibrate=True, objective=ObjectiveSpec(batch_size=4), quorum=1.0)
    cost = estimate(chosen, TASK, infos, chosen.aggregator())
    assert (cost.epsilon, cost.rounds) == (result.epsilon, 0)


def test_the_default_noise_spends_less_than_4() -> None:
    assert 3.9 < epsilon(PrivacySpec(), [], 1) < 4.0
    assert epsilon(PrivacySpec(), [(1.0, 1)], 1) > epsilon(PrivacySpec(), [], 1)


def test_the_prompt_says_what_was_spent_and_evaluates_alike(scene: LayerScene) -> None:
    result = run(scene)
    prompt = make_prompt(ToyScorer(), TASK, result)
    told = prompt.history[-1]
    assert (told["readout_noise"], told["epsilon"]) == (0.7, result.epsilon)
    assert "clip" not in told
    text = model_card(prompt, "")
    assert "made from noisy sums" in text
    assert "held-out training rows chose" not in text
    assert f"per training row of a device | {result.epsilon:.4g}" in text
    found = evaluate(ToyScorer(), TASK, scene.test_rows(), prompt=prompt)
    assert found.accuracy == pytest.approx(result.tuned.accuracy)


def test_label_words_that_are_too_long_are_not_scored(make: Callable[..., LayerScene]) -> None:
    scene = make(task=LONG)
    result = run(scene)
    assert result.is_unscored
    assert {plan.work.reading.n_word_views for plan in plans(scene, MeansWork)} == {0}


# --- repeating and resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("round", [1, 2])
def test_a_run_that_is_stopped_resumes_to_the_same_result(make: Callable[..., LayerScene], round: int) -> None:
    scene, whole = make(), make()
    whole.devices, whole.clients = scene.devices, scene.clients  # the devices keep their keys
    scene.when(closed(round), stop)
    with pytest.raises(StopRunError):
        run(scene)
    for client in scene.clients.values():
        client.restart(graceful=True)
    resumed = run(scene, deadline_s=4.0)
    for client in scene.clients.values():
        client.restart(graceful=True)
    uninterrupted = run(whole)
    for name in ("digest", "layer_fits", "tuned", "zero_shot", "epsilon", "shipped"):
        assert getattr(resumed, name) == getattr(uninterrupted, name), name


def test_a_device_sends_noisy_sums_once_a_run_and_the_same_ones_again(scene: LayerScene) -> None:
    run(scene)
    [asked, *_] = plans(scene, MeansWork)
    device = scene.devices[asked.device]
    first = device.run(asked)
    assert device.run(msgspec.structs.replace(asked, deadline_s=9.0)).result == first.result
    work = asked.work
    assert isinstance(work, MeansWork)
    other = msgspec.structs.replace(work, word_clip=2 * work.word_clip)
    for changes in ({"work": other}, {"round": 9}, {"privacy": PrivacySpec(readout_noise=5.0)}, {"seed": 8}):
        with raises(InputError, field="privacy"):
            device.run(msgspec.structs.replace(asked, **changes))
    again = device.run(msgspec.structs.replace(asked, run="another"))
    assert isinstance(first.result, MeansResult)
    noise = again.result.state_sums.numpy() - first.result.state_sums.numpy()
    assert 0.5 * 0.7 * 2**0.5 < noise.std() < 2 * 0.7 * 2**0.5


def test_the_noise_is_the_devices_own_and_the_counters_tell_nothing(make: Callable[..., LayerScene]) -> None:
    scene = make({"a": rows(24), "b": rows(24)})
    run(scene)
    [one, other] = [scene.devices[plan.device].run(plan) for plan in plans(scene, MeansWork)]
    assert (one.result.label_sums.numpy() != other.result.label_sums.numpy()).all()
    assert one.tokens == other.tokens == 24 * plans(scene, MeansWork)[0].work.reading.n_views
    assert one.seconds == 0


def test_what_was_sent_survives_in_a_devices_state(scene: LayerScene) -> None:
    run(scene)
    [asked, *_] = plans(scene, MeansWork)
    device = scene.devices[asked.device]
    kept = type(device.state).from_bytes(device.state.to_bytes())
    assert kept.released == device.state.released != {}


def test_which_rows_are_summed_does_not_depend_on_their_labels(make: Callable[..., LayerScene]) -> None:
    """Else emptying a row would change which others are in the sum."""
    chosen = []
    for targets in (0, 1):
        relabelled = [(text, targets) for text, _ in rows(24)]
        scene = make({"a": relabelled, "b": rows(12, 50)})
        run(scene, fit_rows=6)
        chosen.append(scene.devices["a"].scored["MeansWork"])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 6


# --- refusals ----------------------------------------------------------------------------------------------------


def test_noisy_sums_without_their_noise_are_refused(scene: LayerScene) -> None:
    run(scene)
    [asked, *_] = plans(scene, MeansWork)
    device = scene.devices[asked.device]
    for changes in ({"privacy": None}, {"prompt": PromptSpec(d=2), "privacy": None}):
        with raises(InputError, field="privacy"):
            device.run(msgspec.structs.replace(asked, run="other", **changes))


@pytest.mark.parametrize("field", ["centre", "projection", "word_centres"])
def test_a_frame_of_another_shape_is_refused(scene: LayerScene, field: str) -> None:
    run(scene)
    [asked, *_] = plans(scene, MeansWork)
    wrong = msgspec.structs.replace(asked.work, **{field: Array.of(np.ones((1, 1, 1)), "<f4")})
    with raises(InputError, field=field):
        scene.devices[asked.device].run(msgspec.structs.replace(asked, run="other", work=wrong))


def test_a_prompt_is_not_summed_with(scene: LayerScene) -> None:
    run(scene)
    [asked, *_] = plans(scene, MeansWork)
    latent = Array.of(np.ones_like(asked.work.reading.latent.numpy()))  # type: ignore[union-attr]
    reading = msgspec.structs.replace(asked.work.reading, latent=latent)  # type: ignore[union-attr]
    work = msgspec.structs.replace(asked.work, reading=reading)
    with raises(InputError, field="latent"):
        scene.devices[asked.device].run(msgspec.structs.replace(asked, run="other", work=work))


@pytest.mark.parametrize("clip", [5e-308, 1e-4, 1e5])
def test_a_clip_that_overflows_is_refused(scene: LayerScene, clip: float) -> None:
    run(scene)
    [asked, *_] = plans(scene, MeansWork)
    wrong = msgspec.structs.replace(asked, work=msgspec.structs.replace(asked.work, word_clip=clip))
    codec.decode(codec.encode(asked), RoundPlan)
    with raises(WireError):
        codec.decode(codec.encode(wrong), RoundPlan)


@pytest.mark.parametrize("field", ["clip", "noise_multiplier", "readout_noise"])
@pytest.mark.parametrize("value", [5e-308, 1e300, math.inf, math.nan])
def test_a_clip_or_noise_of_no_use_is_refused(field: str, value: float) -> None:
    with raises(ConfigError, field=field):
        PrivacySpec(**{field: value})


def test_components_are_those_that_the_rows_in_the_sums_can_bear(make: Callable[..., LayerScene]) -> None:
    """Not all rows that devices have, where ``fit_rows`` is less."""
    found = []
    for fit_rows in (0, 6):
        scene = make()
        run(scene, fit_rows=fit_rows, test_rows=2)
        found.append(plans(scene, MeansWork)[0].work.projection.shape[2])  # type: ignore[union-attr]
    assert found[0] > found[1] == FEWEST_COMPONENTS


# --- rounds that fail --------------------------------------------------------------------------------------------


def test_a_budget_in_seconds_does_not_cut_a_private_readout(make: Callable[..., LayerScene]) -> None:
    scene = make()

    def slow(report: RoundReport) -> RoundReport:
        if isinstance(scene.devices["b"].plans[-1].work, MeansWork):
            time.sleep(1.5)
        return report

    scene.devices["b"].change = slow
    result = run(scene, seconds=0.1, quorum=1.0, test_rows=2)
    assert (result.shipped, result.epsilon) == ("probe", epsilon(SPEC, [], 1))


def test_noisy_sums_of_a_round_that_failed_are_counted_once(make: Callable[..., LayerScene]) -> None:
    scene = make()

    def fail(report: RoundReport) -> RoundReport:
        if isinstance(scene.devices["b"].plans[-1].work, MeansWork):
            raise RuntimeError("no sums from me")
        return report

    scene.devices["b"].change = fail
    with raises(QuorumError):
        run(scene, quorum=1.0, test_rows=2)
    assert scene.store.history("r")[-1].metrics["epsilon"] == epsilon(SPEC, [], 1)
    scene.devices["b"].change = lambda report: report
    assert run(scene, quorum=1.0, test_rows=2).epsilon == epsilon(SPEC, [], 1)


class Unreadable(SpyDevice):
    def info(self) -> Any:
        return msgspec.structs.replace(super().info(), n_layer=0, n_embd=0)


def test_a_model_whose_layers_cannot_be_read_is_refused_with_a_way_out(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "runs.sqlite", *(Unreadable(name, rows(12), [], rows(4)) for name in "ab"))
    with raises(FederationError, field="readout_words"):
        scene.run(
            task=TASK, privacy=SPEC, calibrate=True, objective=ObjectiveSpec(batch_size=4), prompt=PromptSpec(d=4)
        )
    scene.store.close()


def test_settings_name_what_excludes_a_private_readout() -> None:
    RunSettings(rounds=1, privacy=SPEC, readout="means")
    for field, changes in {
        "readout": {"readout": "words"},
        "robust": {"robust": "median"},
        "privacy": {"balanced": True},
    }.items():
        with pytest.raises(ConfigError) as caught:
            RunSettings(rounds=1, privacy=SPEC, **changes)
        assert caught.value.field in (field, "privacy")
        assert field in str(caught.value)


def test_a_search_with_privacy_keeps_the_identity_that_it_had() -> None:
    """Runs of versions without private readouts can be resumed: their settings are told apart by the same fields."""
    before = RunSettings(
        rounds=1,
        privacy=PrivacySpec(clip=0.3, noise_multiplier=2.0),
        calibrate=False,
        objective=ObjectiveSpec(readout_words=0),
    )
    assert b"readout_noise" not in codec.encode(before)
    assert not before.reads_privately
    assert before.epsilon(4, 256, 100) == pytest.approx(epsilon(PrivacySpec(), [(0.125, 1), (1 / 32, 100)]))


# --- sums over devices only --------------------------------------------------------------------------------------

FOUR = {name: rows(20, 60 * i) for i, name in enumerate("abcd")}


def test_a_secure_run_sees_one_noisy_sum_and_reads_as_an_open_one(make: Callable[..., LayerScene]) -> None:
    secure, openly = make(FOUR), make(FOUR)
    seen = run(secure, privacy=LITTLE, secure=True, test_rows=3)
    assert secure.purposes() == ["probe"]
    first, last = secure.store.rounds("r")
    assert {type(report.result) for report in first.reports} == {PublicResult}
    assert [(report.device, type(report.result)) for report in last.reports] == [(SUM, MeansResult)]
    assert {plan.secure.most_rows for plan in plans(secure, MeansWork) if plan.secure} == {0}
    assert all(plan.secure for plan in plans(secure, MeansWork))
    one, other = (found.layer_fits["probe"].weights.numpy().ravel() for found in (seen, run(openly, privacy=LITTLE)))
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99
    assert seen.epsilon == epsilon(LITTLE, [], 1)


def test_devices_share_the_noise_of_a_masked_sum() -> None:
    """Each of n devices adds 1/√t of it, where t are enough for a sum: if all others drop out, it is whole."""
    draws = [Releases(SPEC, b"key", str(i)).noisy(np.zeros(40), devices=3)[0] for i in range(500)]
    assert np.std(draws) == pytest.approx(0.7 / math.sqrt(3), rel=0.02)


def test_a_device_that_drops_out_of_a_secure_sum_ends_no_private_run(make: Callable[..., LayerScene]) -> None:
    scene = make({name: rows(20, 60 * i) for i, name in enumerate("abcde")})

    def drop(report: RoundReport) -> RoundReport:
        if isinstance(scene.devices["b"].plans[-1].work, MeansWork):
            raise RuntimeError("no sums from me")
        return report

    scene.devices["b"].change = drop
    result = run(scene, privacy=LITTLE, secure=True, deadline_s=3.0, test_rows=2)
    assert result.shipped == "probe"
    [*_, last] = scene.store.rounds("r")
    [summed] = last.reports
    assert summed.devices == ("a", "c", "d", "e")
    assert summed.n_texts == 80


def test_a_masked_sum_is_tried_a_few_times_and_never_of_capped_rows(make: Callable[..., LayerScene]) -> None:
    scene = make(FOUR)
    run(scene, secure=True, test_rows=2)
    asked = next(plan for plan in plans(scene, MeansWork) if plan.device == "a")
    device = scene.devices["a"]
    assert asked.secure
    capped = msgspec.structs.replace(asked.secure, most_rows=3)
    with raises(InputError, field="privacy"):
        device.run(msgspec.structs.replace(asked, secure=capped))
    assert len(device.state.released["r"]) == 1
    for tried in range(1, ATTEMPTS):
        device.state.released["r"] = (*device.state.released["r"], f"try {tried}")
    with raises(InputError, field="privacy"):
        device.run(msgspec.structs.replace(asked, secure=msgspec.structs.replace(asked.secure, index=9)))


def test_a_masked_sum_that_was_seen_and_refused_is_not_asked_for_again(make: Callable[..., LayerScene]) -> None:
    scene = make(FOUR)
    liar = scene.devices["b"]
    honest = liar._release_means

    def lie(*args: Any) -> tuple[MeansResult, int]:
        result, n_texts = honest(*args)
        return msgspec.structs.replace(result, label_sums=Array.of(result.label_sums.numpy() + 1e4)), n_texts

    liar._release_means = lie
    for _ in range(2):  # and then from the store
        with raises(FederationError, field="run"):
            run(scene, secure=True, test_rows=2)
        assert len(plans(scene, MeansWork)) == len(FOUR)
        assert scene.store.history("r")[-1].metrics["epsilon"] == epsilon(SPEC, [], 1)
    liar._release_means = honest
    assert run(scene, "another", secure=True, test_rows=2).shipped == "probe"


def test_a_masked_sum_whose_round_is_not_committed_is_not_asked_for_again(
    make: Callable[..., LayerScene], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make(FOUR)

    def refuse(_ledger: Any, round: int, reports: Any) -> tuple[list[RoundReport], dict[str, str]]:
        if isinstance(reports[0].result, MeansResult):
            raise FederationError(f"the reports of round {round} make a plan that no device accepts")
        return list(reports), {}

    monkeypatch.setattr(federation, "vet", refuse)
    with raises(FederationError, field="run"):
        run(scene, secure=True, test_rows=2)
    monkeypatch.undo()
    with raises(FederationError, field="run"):
        run(scene, secure=True, test_rows=2)
    assert len(plans(scene, MeansWork)) == len(FOUR)


# --- a device's own limit ----------------------------------------------------------------------------------------


def limited(most: float, trusted: dict[str, bytes] | None = None) -> Device:
    membership = Membership(trusted=trusted)
    return Device("a", ToyScorer(), rows(24), rows(4), rows(4), task=TASK, max_epsilon=most, membership=membership)


def asked_of(scene: LayerScene) -> RoundPlan:
    run(scene)
    return next(plan for plan in plans(scene, MeansWork) if plan.device == "a")


def test_a_device_refuses_what_would_exceed_its_own_epsilon(scene: LayerScene) -> None:
    asked = asked_of(scene)
    one = epsilon(SPEC, [], 1)
    device = limited(1.2 * one)
    first = device.run(asked)
    assert device.run(asked).result == first.result  # costs nothing
    with raises(InputError, field="privacy", limit=1.2 * one):
        device.run(msgspec.structs.replace(asked, run="another"))
    weak = PrivacySpec(readout_noise=50.0)
    device.run(msgspec.structs.replace(asked, run="a-third", privacy=weak))
    with raises(InputError, field="privacy"):
        limited(0.9 * one).run(asked)


@pytest.mark.parametrize(
    ("work", "releases"),
    [
        (PooledWork(state=STATE, generation=0, popsize=4), [(1 / 6, 1)]),
        (LocalWork(state=STATE, iterations=3, popsize=4), [(1 / 6, 3)]),
        (SelectWork(templates=TASK.templates, max_rows=12), [(0.5, 1)]),
    ],
)
def test_losses_count_as_in_a_runs_own_figure(scene: LayerScene, work: Work, releases: list[tuple[float, int]]) -> None:
    asked = msgspec.structs.replace(asked_of(scene), work=work)
    spent = epsilon(SPEC, releases)
    limited(spent * 1.001).run(asked)
    with raises(InputError, field="privacy"):
        limited(spent * 0.999).run(asked)


def test_peers_that_may_be_invented_bear_no_part_of_the_noise(scene: LayerScene) -> None:
    """A coordinator that makes up the other devices of a sum sees this one's, with its part of the noise."""
    use = SecureUse(epoch="e", index=0, peers=("a", "b", "c", "d"))
    asked = msgspec.structs.replace(asked_of(scene), secure=use)
    one, part = epsilon(SPEC, [], 1), epsilon(PrivacySpec(readout_noise=0.7 / math.sqrt(3)), [], 1)
    for device, field in (
        (limited(1.01 * one), "privacy"),
        (limited(0.99 * part), "privacy"),
        (limited(1.01 * part), "epoch"),  # it has no keys
        (limited(1.01 * one, trusted={"b": bytes(32)}), "epoch"),
        (limited(0.99 * one, trusted={"b": bytes(32)}), "privacy"),
    ):
        with raises(InputError, field=field):
            device.run(asked)


def test_what_is_refused_or_cancelled_costs_nothing(scene: LayerScene) -> None:
    asked = asked_of(scene)
    device = limited(1.01 * epsilon(SPEC, [], 1), trusted={})
    with raises(ScoringInterrupted):
        device.run(msgspec.structs.replace(asked, run="cancelled"), cancelled=lambda: True)
    work = msgspec.structs.replace(asked.work, centre=Array.of(np.ones((1, 1)), "<f4"))
    with raises(InputError, field="centre"):
        device.run(msgspec.structs.replace(asked, work=work))
    use = SecureUse(epoch="e", index=0, peers=("a", "b", "c"))
    with raises(InputError, field="epoch"):  # it has no keys, after its sums were made
        device.run(msgspec.structs.replace(asked, secure=use))
    assert device.state.released == {}
    device.run(asked)


def test_a_restarted_device_knows_what_it_has_spent_and_repeats_its_noise(scene: LayerScene, tmp_path: Path) -> None:
    asked = asked_of(scene)
    most = 1.2 * epsilon(SPEC, [], 1)
    path = tmp_path / "devices" / "a.state"

    def device(n_rows: int = 24) -> Device:
        return Device("a", ToyScorer(), rows(n_rows), task=TASK, state=state, max_epsilon=most, keep=keep)

    with kept_state(path) as (state, keep):
        first = device().run(asked).result
        spent = device().epsilon_spent
        with raises(StoreError, field="--state"), kept_state(path):
            pass
    assert path.stat().st_mode & 0o777 == 0o600
    with kept_state(path) as (state, keep):
        assert device().epsilon_spent == spent > 0
        assert device().run(asked).result == first
        assert device().epsilon_spent == spent
        for plan in (msgspec.structs.replace(asked, run="another"), asked):  # the latter of other rows
            with raises(InputError, field="privacy"):
                device(23).run(plan)
    assert list(path.parent.iterdir()) == [path]


def test_other_rows_have_other_noise(scene: LayerScene) -> None:
    """The difference of two sums with the same noise would be that of their rows."""
    asked = asked_of(scene)
    state = DeviceState()
    read = [(text, LabelIndex(int(label), TASK.labels[int(label)])) for text, label in rows(24)]  # as from a file
    others = rows(23), [*rows(23), (rows(24)[23][0], 1 - int(rows(24)[23][1]))]
    first, same, *changed = (
        Device("a", ToyScorer(), given, task=TASK, state=state)._question(asked) for given in (rows(24), read, *others)
    )
    assert first == same
    assert first not in changed
    assert first != Device("a", OtherProcessor(), rows(24), task=TASK, state=state)._question(asked)


def test_what_cannot_be_kept_is_not_sent(scene: LayerScene, tmp_path: Path) -> None:
    asked = asked_of(scene)
    path = tmp_path / "folder" / "a.state"
    with kept_state(path) as (state, keep):
        device = Device("a", ToyScorer(), rows(24), task=TASK, state=state, keep=keep)
        away = path.parent.rename(tmp_path / "away")
        path.parent.touch()
        with pytest.raises(StoreError) as caught:
            device.run(asked)
        assert str(tmp_path) not in str(caught.value)  # it is sent to the coordinator
        path.parent.unlink()
        away.rename(path.parent)
        device.run(asked)
    before = path.read_bytes()
    with raises(StoreError, field="--state"):  # a thread that still works
        keep(DeviceState())
    assert path.read_bytes() == before
    path.write_bytes(path.read_bytes()[:-1])
    with raises(ConfigError, field="--state"), kept_state(path):
        pass


def test_a_link_to_a_state_is_that_state(tmp_path: Path) -> None:
    path, link = tmp_path / "a.state", tmp_path / "link.state"
    link.symlink_to(path)
    with kept_state(link), raises(StoreError, field="--state"), kept_state(path):
        pass
    assert link.is_symlink()


def test_what_was_sent_before_there_was_a_limit_counts(scene: LayerScene) -> None:
    asked, state = asked_of(scene), DeviceState()
    device = Device("a", ToyScorer(), rows(24), task=TASK, state=state)
    device.run(asked)
    assert not state.told_exactly
    most = 1.01 * epsilon(SPEC, [], 1)
    later = Device(
        "a", ToyScorer(), rows(24), task=TASK, state=DeviceState.from_bytes(state.to_bytes()), max_epsilon=most
    )
    assert later.epsilon_spent == pytest.approx(most / 1.01)
    with raises(InputError, field="privacy"):
        later.run(msgspec.structs.replace(asked, run="another"))
    work = PooledWork(state=STATE, generation=0, popsize=4)
    device.run(msgspec.structs.replace(asked, privacy=None, work=work))
    assert DeviceState.from_bytes(state.to_bytes()).told_exactly


def test_a_run_without_privacy_is_told_once(scene: LayerScene) -> None:
    """And nothing of its plans, which may be large, is encoded to count it."""
    work = PooledWork(state=STATE, generation=0, popsize=4)
    plan = msgspec.structs.replace(asked_of(scene), privacy=None, work=work)
    kept: list[bool] = []
    device = Device("a", ToyScorer(), rows(24), task=TASK, keep=lambda state: kept.append(state.told_exactly))
    device.run(plan)
    device.run(plan)
    assert kept == [True]
    assert "_basis" not in vars(device)


def test_work_that_tells_nothing_is_not_kept(scene: LayerScene) -> None:
    run(scene)
    public = next(plan for plan in plans(scene, PublicWork) if plan.device == "a")
    device = Device("a", ToyScorer(), rows(24), task=TASK, keep=lambda _state: pytest.fail("it was kept"))
    device.run(public)


def test_a_sum_counted_with_all_noise_costs_more_once_peers_may_be_invented(scene: LayerScene) -> None:
    use = SecureUse(epoch="e", index=0, peers=("a", "b", "c", "d"))
    asked = msgspec.structs.replace(asked_of(scene), secure=use)
    state, most = DeviceState(), 1.2 * epsilon(SPEC, [], 1)
    PrivacyLimit(most, 24, state, knows_peers=True).record(asked, "question")
    careful = PrivacyLimit(most, 24, state)
    with raises(InputError, field="privacy"):
        careful.check(asked, "question")
    PrivacyLimit(None, 24, state).record(asked, "question")
    assert careful.spent > most


class OtherProcessor(ToyScorer):
    backend = "gpu"


@pytest.mark.parametrize(
    "work", [PooledWork(state=STATE, generation=0, popsize=4), SelectWork(templates=TASK.templates)]
)
def test_a_private_plan_that_does_not_fit_is_refused_whatever_the_rows(scene: LayerScene, work: Work) -> None:
    """Else its error would tell the coordinator how long the longest row is."""
    asked = asked_of(scene)
    tight = msgspec.structs.replace(asked.objective, max_text_tokens=ToyScorer().n_ctx_train)
    plan = msgspec.structs.replace(asked, work=work, objective=tight)
    said = set()
    for longest in ("x", "x" * 200, "x" * 4000):
        device = Device("a", ToyScorer(), [*rows(23), (longest, 0)], task=TASK)
        with raises(InputError, field="max_text_tokens") as caught:
            device.run(plan)
        said.add(caught.value.public)
    assert len(said) == 1


def test_an_error_about_rows_says_nothing_of_them_in_a_private_run(scene: LayerScene, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise InputError("a text of 53 tokens is too long", limit=53)

    asked = msgspec.structs.replace(asked_of(scene), work=PooledWork(state=STATE, generation=0, popsize=4))
    monkeypatch.setattr("fedbpt.device.device.Objective", fail)
    with raises(InputError, field="rows") as caught:
        Device("a", ToyScorer(), rows(24), task=TASK).run(asked)
    assert "53" not in caught.value.public
    assert caught.value.limit is None


def test_another_try_of_a_masked_sum_costs_as_much_again_and_the_refusal_says_so(scene: LayerScene) -> None:
    use = SecureUse(epoch="e", index=0, peers=("a", "b", "c"))
    asked = msgspec.structs.replace(asked_of(scene), secure=use)
    again = msgspec.structs.replace(asked, secure=msgspec.structs.replace(use, index=1))
    limit = PrivacyLimit(1.1 * epsilon(SPEC, [], 1), 24, DeviceState(), knows_peers=True)
    limit.check(asked, "first")
    assert limit.spent == 0
    limit.record(asked, "first")
    limit.check(asked, "first")
    with raises(InputError, field="privacy") as caught:
        limit.check(again, "again")
    assert "a secure sum is tried again" in str(caught.value)


def test_a_device_with_a_limit_uses_training_rows_with_noise_only(scene: LayerScene) -> None:
    asked = asked_of(scene)
    device = limited(100.0)
    public = next(plan for plan in plans(scene, PublicWork) if plan.device == "a")
    device.run(msgspec.structs.replace(public, privacy=None))
    with raises(InputError, field="privacy"):
        device.run(msgspec.structs.replace(asked, privacy=None, work=PooledWork(state=STATE, generation=0, popsize=4)))
    request = scene.devices["a"].requests[-1]
    device.evaluate(request)
    with raises(InputError, field="split"):
        device.evaluate(msgspec.structs.replace(request, split="held", held=HeldRows(seed=0)))
