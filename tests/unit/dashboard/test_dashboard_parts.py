"""The dashboard's numbers, texts and charts, without a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedbpt import models
from fedbpt.coordinator.clients import HttpClient, MailboxClient, PostOffice
from fedbpt.coordinator.clients.remote import RemoteDevice
from fedbpt.coordinator.clients.requests import RETRY_S
from fedbpt.dashboard import charts, costs, heartbeat, texts
from fedbpt.dashboard.state import RunState
from fedbpt.dashboard.views import DeviceView, Point, RunView
from fedbpt.errors import ModelNotFoundError

SHAPE = costs.ModelShape(n_weights=1_000_000, n_embd=100, adapted=1200)
DEVICE = DeviceView("pi5", "live", "", 61.4, 2**28, None, None, 900, 5400, 3, 0.5, 0.8, (0.72, 0.86))
EMPTY = RunState("r").view()


def view(**changes: object) -> RunView:
    return dataclasses.replace(EMPTY, **changes)  # type: ignore[arg-type]


# --- costs -----------------------------------------------------------------------------------------------------------


def test_other_methods_send_float32_parameters_both_ways_for_each_report() -> None:
    assert costs.bytes_of_others(SHAPE, participations=3) == {
        "Soft-prompt FedAvg": 3 * 2 * 4 * 50 * 100,
        "LoRA, r = 8": 3 * 2 * 4 * 8 * 1200,
        "Full fine-tuning": 3 * 2 * 4 * 1_000_000,
    }


def test_a_shape_counts_all_weights_and_what_lora_adapts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"token_embd.weight": (8, 50), "output_norm.weight": (8,)}
    for layer in ("blk.0", "blk.1"):
        tensors |= {f"{layer}.attn_q.weight": (8, 16), f"{layer}.attn_k.weight": (8, 4)}
        tensors |= {f"{layer}.attn_v.weight": (8, 4), f"{layer}.ffn_up.weight": (8, 32)}
    monkeypatch.setattr(models, "tensor_shapes", lambda _path: tensors)
    assert costs.shape_of(Path("model.gguf")) == (400 + 8 + 2 * (128 + 32 + 32 + 256), 8, 2 * (24 + 12))


def test_an_absent_or_different_model_has_no_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(_name: str) -> Path:
        raise ModelNotFoundError("no such model")

    monkeypatch.setattr(models, "tensor_shapes", lambda _path: {"token_embd.weight": (8, 50)})
    monkeypatch.setattr(models, "fingerprint", lambda _path: "sha256:this")
    monkeypatch.setattr(models, "locate", lambda _name: tmp_path)
    assert costs.shape_of_model("m", "sha256:this") == (400, 8, 0)
    assert costs.shape_of_model("m", "sha256:other") is None
    monkeypatch.setattr(models, "locate", absent)
    assert costs.shape_of_model("m", "sha256:this") is None


def test_measured_memory_names_its_machine_and_includes_back_propagation() -> None:
    found = costs.memory_figures("smollm2-135m")
    assert found is not None
    assert not any(name.startswith("fedbpt") for name in found.of_others())  # the run's own figure is the one
    assert len(found.of_others()) < len(found.peak_rss)
    assert all((found.machine, found.date, found.how))
    assert "Back-propagation (PEFT)" in found.peak_rss
    assert costs.memory_figures("bogus") is None


# --- heartbeat -------------------------------------------------------------------------------------------------------


def test_a_dead_device_shows_within_two_seconds_and_before_a_round_gives_up() -> None:
    from fedbpt.dashboard.pages import POLL_S

    assert heartbeat.INTERVAL_S + heartbeat.TIMEOUT_S + POLL_S <= 2.0 < RETRY_S


@pytest.mark.parametrize(
    "client", [HttpClient("http://pi5:8401", "pi5", poll_s=3.0), MailboxClient("pi5", PostOffice(), 3.0)]
)
def test_a_twin_reaches_the_same_device_and_counts_separately(client: RemoteDevice) -> None:
    twin = client.twin()
    assert (twin.where, twin.name, twin is client) == (client.where, "pi5", False)
    assert twin._poll_s == client._poll_s == 3.0


# --- words -----------------------------------------------------------------------------------------------------------


def test_figures_and_gains_are_in_points_or_perplexity() -> None:
    assert (texts.figure(0.9234, False), texts.figure(7.309, True)) == ("92.3 %", "7.31")
    assert texts.figure(None, False) == "–"
    assert texts.gain(view(figure=0.92, zero_shot=0.825, searched=1)) == "+9.5 points"
    assert texts.gain(view(figure=7.3, zero_shot=9.1, generates=True, searched=1)) == "-1.80"
    assert texts.gain(view(figure=0.9, searched=1)) == ""
    assert texts.gain(view(figure=0.8, zero_shot=0.8)) == ""  # nothing was searched yet


def test_the_time_left_is_never_shown_as_zero() -> None:
    assert texts.progress(view(status="running", eta_s=43.2)) == "about 0:43 left"
    assert texts.progress(view(status="running", eta_s=0.0)) == "nearly done"
    assert texts.progress(view(status="running")) == ""


@pytest.mark.parametrize(("seconds", "said"), [(None, "–"), (7.2, "0:07"), (187, "3:07"), (3723, "1:02:03")])
def test_durations(seconds: float | None, said: str) -> None:
    assert texts.duration(seconds) == said


def test_a_device_row_has_a_dash_for_unknown_values() -> None:
    row = texts.device_row(DEVICE, generates=False)
    assert (row["speed"], row["memory"], row["health"], row["figure"]) == (
        "61 tok/s", "268.4 MB", "–", "80.0 % (72.0 – 86.0 %)",
    )  # fmt: skip
    known = dataclasses.replace(DEVICE, celsius=61.4, battery=83.0)
    assert texts.device_row(known, generates=False)["health"] == "83 % · 61 °C"


def labelled(*labels: str, n: int = 3, **changes: object) -> RunView:
    devices = tuple(dataclasses.replace(DEVICE, name=f"d{i}") for i in range(n))
    return view(devices=devices, task="bbc-news", model="m", labels=labels, status="running", **changes)


def test_a_sentence_describes_the_run() -> None:
    assert "devices" not in texts.sentence(EMPTY)
    said = texts.sentence(labelled("sport", "tech"))
    assert said.startswith("Three devices teach a frozen m ")
    assert all(part in said for part in ("bbc-news", "sport or tech"))
    assert texts.sentence(labelled("a", "b", n=1, stage="search")).startswith("One device teaches a frozen m ")
    many = tuple(f"label {i}" for i in range(30))
    assert "30 labels" in texts.sentence(labelled(*many))
    assert "label 1" not in texts.sentence(labelled(*many))
    assert "Twelve devices" in texts.sentence(labelled("a", "b", n=12))
    assert "13 devices" in texts.sentence(labelled("a", "b", n=13))
    assert "One device taught" in texts.sentence(dataclasses.replace(labelled("a", "b", n=1), status="finished"))
    assert "to write like the examples of bbc-news" in texts.sentence(labelled(generates=True))
    assert "bbc-news; " in texts.sentence(labelled())  # earlier versions stored only the task's name


def test_the_state_includes_the_stage() -> None:
    assert texts.state(labelled("a", "b", stage="calibration")) == "running · calibration"
    assert texts.state(view(status="finished")) == "finished"
    assert [texts.state(labelled("a", "b", stage=stage)) for stage in ("selection", "search", "readout")] == [
        "running · template", "running · search", "running · readout",
    ]  # fmt: skip


def test_rounds_are_counted_once_the_run_has_started() -> None:
    assert texts.rounds(EMPTY) == "–"
    assert texts.rounds(view(status="running", rounds_limit=100)) == "0 / 100"
    assert texts.rounds(view(status="running", searched=1234)) == "1,234 / 40"
    assert texts.rounds(view(status="running", searched=7, rounds_limit=0)) == "7"


def test_every_accuracy_has_its_interval() -> None:
    found = view(figure=0.92, zero_shot=0.8, zero_shot_interval=(0.7, 0.87), interval=(0.84, 0.96), n_rows=100)
    assert texts.confidence(found) == "95 % interval 84.0 – 96.0 %"
    assert texts.basis(found) == "zero-shot 80.0 % (70.0 – 87.0 %) · 100 development rows"
    assert texts.confidence(view(figure=7.3, generates=True)) == ""


def test_the_speed_is_of_the_tokens_and_seconds_that_the_terminal_prints() -> None:
    assert texts.speed(view(tokens=9000, seconds=60.0)) == "150 tokens/s"
    assert texts.speed(view(seconds=3.0)) == ""


def test_every_status_has_a_text_and_a_style() -> None:
    assert set(texts.STATUS) == set(texts.STATUS_STYLE)
    assert set(texts.DEVICE_STATUS) == set(texts.DEVICE_STYLE)


# --- charts ----------------------------------------------------------------------------------------------------------


def test_a_curve_has_its_points_and_the_line_to_beat() -> None:
    options = charts.curve("accuracy", " %")
    charts.set_curves(options, {"tuned": ([Point(0, 78.0), Point(20, 92.34567)], "red", 3)}, 78.0)
    [line] = options["series"]
    assert line["data"] == [[0, 78.0], [20, 92.3457]]
    assert line["markLine"]["data"] == [{"yAxis": 78.0}]
    assert options["yAxis"]["min"] < 78.0 < 92.4 < options["yAxis"]["max"]


def test_long_curves_are_thinned_with_their_ends_and_without_marks() -> None:
    points = [Point(i, float(i)) for i in range(1000)]
    thin = charts.thinned(points)
    assert (len(thin), thin[0], thin[-1]) == (charts.MAX_POINTS, points[0], points[-1])
    assert [point.round for point in thin] == sorted({point.round for point in thin})
    assert charts.thinned(points[:3]) == points[:3]
    options = charts.curve("loss", "")
    charts.set_curves(options, {"loss": (points, "red", 1)}, None)
    assert (options["series"][0]["showSymbol"], options["series"][0]["sampling"]) == (False, "lttb")


def test_many_devices_have_no_legend() -> None:
    options = charts.curve("devices", "")
    charts.set_devices(options, {f"device-{i}": [Point(1, 1.0)] for i in range(50)})
    assert (len(options["series"]), options["legend"]["show"]) == (50, False)
    charts.set_devices(options, {"device-0": [Point(1, 1.0)]})
    assert options["legend"]["show"] is True


def test_bars_are_labelled_and_zero_works_on_a_logarithmic_scale() -> None:
    options = charts.bars("bytes", logarithmic=True)
    charts.set_bars(options, {"ours": 0, "others": 1.2e9}, "ours")
    first, second = options["series"][0]["data"]
    assert (first["name"], second["name"]) == ("0 B", "1.2 GB")
    assert first["value"] >= options["xAxis"]["min"] > 0
    linear = charts.bars("bytes", logarithmic=False)
    charts.set_bars(linear, {"ours": 5, "others": 7}, "ours")
    assert (linear["xAxis"]["type"], linear["xAxis"]["min"]) == ("value", 0)
    charts.set_bars(options, {}, "ours")
    assert options["series"][0]["data"] == []
