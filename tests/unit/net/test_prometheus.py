"""Prometheus' text format, parsed by Prometheus' own client."""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from fedbpt.net.prometheus import Family, Histogram, Sample, exposition


def test_names_kinds_and_labels_survive_whatever_they_hold() -> None:
    odd = 'a "quoted" \\ name\nof two lines'
    [counter, gauge] = text_string_to_metric_families(
        exposition(
            [
                Family("work_total", "counter", "Work.", [Sample(3, {"device": odd}), Sample(4, {"device": "b"})]),
                Family("empty", "gauge", "Nothing.", []),
                Family("loss", "gauge", "Nats.", [Sample(math.nan)]),
            ]
        )
    )
    assert (counter.name, counter.type, counter.documentation) == ("fedbpt_work", "counter", "Work.")
    assert [(s.name, s.labels["device"], s.value) for s in counter.samples] == [
        ("fedbpt_work_total", odd, 3.0),
        ("fedbpt_work_total", "b", 4.0),
    ]
    assert (gauge.name, math.isnan(gauge.samples[0].value)) == ("fedbpt_loss", True)


def test_a_histogram_counts_up_to_and_with_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    text = exposition([Family("seconds", "histogram", "S.", histogram.samples({"run": "r"}))])
    [found] = text_string_to_metric_families(text)
    values = {sample.name + sample.labels.get("le", ""): sample.value for sample in found.samples}
    assert values == {
        "fedbpt_seconds_bucket1.0": 2,
        "fedbpt_seconds_bucket2.0": 3,
        "fedbpt_seconds_bucket+Inf": 4,
        "fedbpt_seconds_sum": 12.0,
        "fedbpt_seconds_count": 4,
    }
    assert {sample.labels["run"] for sample in found.samples} == {"r"}
