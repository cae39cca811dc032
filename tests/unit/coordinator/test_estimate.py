"""The estimated cost of a run, compared with the cost of a real one; impossible budgets."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.costs.estimate import RunCost, estimate
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.protocol.specs import ObjectiveSpec, PrivacySpec, PromptSpec, Template
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Task
from tests.support.raises import raises
from tests.support.toy_scene import settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows


def info(name: str = "pi5", n_train: int = 100, speed: float | None = 50.0) -> DeviceInfo:
    return DeviceInfo(
        name=name, version="1", model_fingerprint="f", model_name="toy", backend="cpu", n_train=n_train, n_dev=0,
        n_test=0, ram_bytes=8 << 30, rss_bytes=300_000_000, peak_rss_bytes=300_000_000, tokens_per_second=speed,
    )  # fmt: skip


def cost(*infos: DeviceInfo, **changes: Any) -> RunCost:
    settings = msgspec.structs.replace(RunSettings(rounds=10, popsize=16), **changes)
    return estimate(settings, TASK, infos or (info(),), settings.aggregator())


def long_text(n: int) -> str:
    """Long enough for the task's limit of tokens."""
    return f"{n} " + "number " * 3


@pytest.mark.parametrize("placement", ["cue", "front"])
def test_the_readouts_other_templates_count_towards_tokens_and_deadline(placement: Any) -> None:
    more = [msgspec.structs.replace(each, pattern=f"{each.pattern[:-1]};") for each in TASK.templates]
    task = msgspec.structs.replace(TASK, templates=(*TASK.templates, *more))
    objective = ObjectiveSpec(batch_size=2, max_text_tokens=16, readout_words=16)
    settings = RunSettings(
        rounds=1,
        popsize=4,
        prompt=PromptSpec(d=20, placement=placement),
        objective=objective,
        select_rows=1,
        ensemble=4,
        readout="words",
    )
    spent, bound = [], []
    for changed in (settings, msgspec.structs.replace(settings, ensemble=1)):
        device = Device("d", ToyScorer(), [(long_text(i), label) for i, (_, label) in enumerate(rows(24))], task=TASK)
        bound.append(estimate(changed, task, [device.info()], changed.aggregator()).devices[0])
        with RunStore(":memory:") as store:
            federation = Federation([InProcessClient(device)], task, changed, changed.aggregator(), store, "run")
            spent.append(federation.run())
    counted, measured = bound[0].tokens - bound[1].tokens, spent[0].tokens - spent[1].tokens
    assert counted == bound[0].others > bound[1].others == 0
    assert 0.7 < measured / counted <= 1
    for one, expected in zip(spent, bound, strict=True):
        assert 0.3 < one.bytes_up / expected.bytes_up < 1.1
        assert 0.3 < one.bytes_down / expected.bytes_down < 1.1
    assert 0.7 < (spent[0].bytes_down / spent[1].bytes_down) / (bound[0].bytes_down / bound[1].bytes_down) < 1.4
    speed = info(n_train=24, speed=1.0)
    short = msgspec.structs.replace(settings, deadline_s=float(bound[0].others - 1))
    with raises(ConfigError, field="deadline_s"):
        estimate(short, task, [speed], short.aggregator())
    single = msgspec.structs.replace(short, ensemble=1)
    assert estimate(single, task, [speed], single.aggregator()).rounds == 1


@pytest.mark.parametrize("readout", ["layers", "words"])
@pytest.mark.parametrize("method", ["pooled", "fedavg", "fedbpt"])
def test_a_run_costs_no_more_than_estimated_and_not_much_less(method: Any, readout: Any) -> None:
    devices = 2 if method == "fedbpt" else 1
    objective = ObjectiveSpec(max_text_tokens=16, readout_words=16)
    settings = RunSettings(
        rounds=12,
        popsize=6,
        iterations=3,
        method=method,
        prompt=PromptSpec(d=20),
        objective=objective,
        baselines=True,
        readout=readout,
    )
    made = [Device(f"d{i}", ToyScorer(), rows(24), task=TASK) for i in range(devices)]
    expected = estimate(settings, TASK, [device.info() for device in made], settings.aggregator())
    with RunStore(":memory:") as store:
        clients = [InProcessClient(device) for device in made]
        result = Federation(clients, TASK, settings, settings.aggregator(), store, "run").run()
    assert result.evaluations == expected.evaluations
    assert 0.3 < result.tokens / sum(device.tokens for device in expected.devices) <= 1
    for spent, bound in zip(result.devices, expected.devices, strict=True):
        assert 0.3 < spent.bytes_up / bound.bytes_up < 1.1  # messages other than those of rounds are few and small
        assert 0.3 < spent.bytes_down / bound.bytes_down < 1.1


def test_a_text_under_another_template_costs_only_its_end_if_beginnings_are_shared() -> None:
    three = Task(name="toy", labels=TASK.labels, templates=(*TASK.templates, *TASK.templates, *TASK.templates))
    settings = RunSettings(rounds=10)
    sharing = msgspec.structs.replace(info(), shares_beginnings=True)
    apart, together = (
        estimate(settings, three, [each], settings.aggregator()).devices[0] for each in (info(), sharing)
    )
    assert together.select < apart.select / 3
    assert together.others < apart.others / 5
    assert (together.texts, together.round) == (apart.texts, apart.round)
    framed = Template(pattern="Review: {text}\nRating:", label_words=(" bad", " good"))
    unlike = Task(name="toy", labels=TASK.labels, templates=(*TASK.templates, framed))
    one, other = estimate(settings, unlike, [info(), sharing], settings.aggregator()).devices
    assert one == other


def test_a_candidate_that_shifts_a_layer_costs_the_later_layers_only() -> None:
    """Of 30 layers the one with number 14 is shifted, so that 15 run; texts and label words of a token each."""
    deep = msgspec.structs.replace(info(speed=5000.0), n_layer=30)
    placed = {place: PromptSpec(d=20, placement=place) for place in ("cue", "layer")}
    cue, layer = (cost(deep, prompt=placed[place]).devices[0] for place in ("cue", "layer"))
    assert layer.round == cue.round / 2
    assert layer.texts - cue.texts == cue.round + 100  # once by all layers, and each text's state
    worded = msgspec.structs.replace(
        deep, word_tokens={codec.digest(template): 3 for template in TASK.templates}, word_tokens_per_second=5000.0
    )
    cue, layer = (cost(worded, prompt=placed[place]).devices[0] for place in ("cue", "layer"))
    assert layer.round == cue.round


def test_seconds_follow_from_each_devices_speed() -> None:
    found = cost(info("slow", speed=50.0), info("fast", speed=500.0), info("new", speed=None))
    slow, fast, new = found.devices
    assert slow.seconds == pytest.approx(10 * (fast.seconds or 0))
    assert new.seconds is None
    assert slow.seconds == pytest.approx(slow.tokens / 50)


def test_evaluations_and_tokens_limit_rounds() -> None:
    assert cost(rounds=0, evaluations=800).rounds == 50
    whole = cost(rounds=20).devices[0]
    assert cost(rounds=0, tokens=whole.texts + 7 * whole.round).rounds == 7
    assert cost(rounds=0, seconds=(whole.texts + 7.5 * whole.round) / 50).rounds == 7


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("tokens", {"rounds": 0, "tokens": 100}),
        ("seconds", {"rounds": 0, "seconds": 1.0}),
        ("deadline_s", {"deadline_s": 10.0}),
    ],
)
def test_an_impossible_budget_is_refused_with_the_nearest_possible_one(field: str, changes: dict[str, Any]) -> None:
    with raises(ConfigError, field=field) as refused:
        cost(**changes)
    nearest = refused.value.limit
    assert nearest is not None
    assert f"{nearest}" in str(refused.value)
    assert cost(**{**changes, field: nearest}).rounds >= 1
    with raises(ConfigError, field=field):
        cost(**{**changes, field: nearest - 2})


def test_a_budget_of_only_seconds_needs_every_devices_speed() -> None:
    with raises(ConfigError, field="rounds"):
        cost(info(speed=None), rounds=0, seconds=60.0)


def test_a_device_measures_its_speed_before_any_round() -> None:
    device = Device("d", ToyScorer(), rows(4), task=TASK)
    assert device.info().tokens_per_second is None
    assert device.measure_speed() > 0
    assert (device.info().tokens_per_second or 0) > 0


def test_the_aggregator_is_not_changed() -> None:
    settings = RunSettings(rounds=3, popsize=6)
    aggregator = settings.aggregator()
    before = aggregator.digest()
    estimate(settings, TASK, [info()], aggregator)
    assert aggregator.digest() == before


def test_the_estimated_epsilon_is_the_one_spent() -> None:
    private = settings(
        rounds=3, method="pooled", popsize=6, privacy=PrivacySpec(clip=1.0, noise_multiplier=2.0), quorum=1.0
    )
    device = Device("a", ToyScorer(), rows(12), [], rows(4), task=TASK)
    told = estimate(private, TASK, [device.info()], private.aggregator()).epsilon
    with RunStore(":memory:") as store:
        spent = Federation([InProcessClient(device)], TASK, private, private.aggregator(), store, "r").run().epsilon
    assert told == spent is not None
    assert cost().epsilon is None
