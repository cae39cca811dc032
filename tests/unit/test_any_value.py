"""The public API with any value for any argument works, or raises a `FedbptError` that names the argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedbpt
from fedbpt import Budget, ObjectiveSpec, Prompt, PromptSpec, Task, Template, models, tasks
from fedbpt.api import make_prompt
from fedbpt.bench import measurement
from fedbpt.device.device import Device
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.engine.text_stream import Generation, place
from fedbpt.errors import ConfigError, FedbptError
from fedbpt.protocol.specs import PrivacySpec
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.side_by_side.sides import SideBySide
from tests.support.any_value import VALUES, fault_of, ignored
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

ROWS = rows(8)
TEMPLATE = TASK.templates[0]
SPEC = PromptSpec(d=4)
PROMPT = {
    "rows": np.ones((1, 8), dtype=np.float32),
    "spec": SPEC,
    "task_name": TASK.name,
    "labels": TASK.labels,
    "template": TEMPLATE,
    "model_fingerprint": ToyScorer().fingerprint,
    "model_name": "toy",
    "architecture": "toy",
}
MADE = Prompt(**PROMPT)
ANSWERED = Task(name="replies", templates=(Template(pattern="{text}\nMood:", label_words=()),))
TARGETS = [(f"text {i}", "small" if i % 2 else "large") for i in range(8)]
HERE = {"path": "rows.jsonl"}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "tune": (
        fedbpt.tune,
        {
            "scorer": ToyScorer(),
            "task": TASK,
            "train": ROWS,
            "prompt": SPEC,
            "popsize": 8,
            "budget": Budget(evaluations=8),
        },
    ),
    "evaluate": (fedbpt.evaluate, {"scorer": ToyScorer(), "task": TASK, "rows": ROWS}),
    "calibrate": (fedbpt.calibrate, {"scorer": ToyScorer(), "task": TASK, "texts": ["good", "bad"]}),
    "answers": (fedbpt.answers, {"scorer": ToyScorer(), "task": ANSWERED, "rows": TARGETS}),
    "compare_answers": (
        fedbpt.compare_answers,
        {"scorer": ToyScorer(), "task": ANSWERED, "rows": TARGETS, "train": TARGETS},
    ),
    "sample_targets": (
        fedbpt.sample_targets,
        {
            "scorer": ToyScorer(),
            "task": ANSWERED,
            "texts": ["good"],
            "examples": TARGETS,
            "metric": "max-words:40",
            "n_samples": 2,
        },
    ),
    "refine": (
        fedbpt.refine,
        {
            "scorer": ToyScorer(),
            "task": ANSWERED,
            "train": TARGETS * 4,
            "prompt": Prompt(**{**PROMPT, "labels": (), "task_name": "replies", "template": ANSWERED.templates[0]}),
            "popsize": 4,
            "budget": Budget(evaluations=4),
        },
    ),
    "features": (fedbpt.features, {"scorer": ToyScorer(), "texts": ["good", "bad"]}),
    "export_prompt": (fedbpt.export_prompt, {"prompt": MADE, "out": "exported.npy", "to": "npy"}),
    "import_prompt": (fedbpt.import_prompt, {"folder": "adapter", "scorer": ToyScorer()}),
    "load_model": (fedbpt.load_model, {"name_or_path": "absent.gguf"}),
    "check_model": (fedbpt.check_model, {"name_or_path": "absent.gguf"}),
    "Budget": (Budget, {}),
    "ObjectiveSpec": (ObjectiveSpec, {}),
    "PromptSpec": (PromptSpec, {}),
    "Template": (Template, {"pattern": "{text}\nMood:", "label_words": (" b", " g")}),
    "tasks.Generation": (tasks.Generation, {}),
    "Task": (Task, {"name": "mood", "templates": TASK.templates, "labels": TASK.labels}),
    "PrivacySpec": (PrivacySpec, {"clip": 1.0, "noise_multiplier": 1.0}),
    "RunSettings": (RunSettings, {}),
    "Sampling": (Sampling, {}),
    "Prompt": (Prompt, PROMPT),
    "Prompt.load": (Prompt.load, {"path": "absent.safetensors"}),
    "Prompt.save": (MADE.save, {"path": "saved.safetensors"}),
    "Prompt.check": (MADE.check, {"model": ToyScorer()}),
    "Prompt.with_rows": (MADE.with_rows, {"rows": MADE.rows, "history": ()}),
    "make_prompt": (make_prompt, {"scorer": ToyScorer(), "task": TASK, "result": None}),
    "tasks.load": (tasks.load, {"name_or_path": "absent"}),
    "tasks.load_task": (tasks.load_task, {"path": "absent"}),
    "tasks.read_rows": (tasks.read_rows, {**HERE, "labels": TASK.labels}),
    "tasks.read_task_rows": (tasks.read_task_rows, {**HERE, "task": TASK}),
    "tasks.rows_from_dataset": (tasks.rows_from_dataset, {"dataset": ROWS, "labels": TASK.labels}),
    "tasks.to_rows": (tasks.to_rows, {"data": ROWS, "task": TASK}),
    "tasks.with_examples": (tasks.with_examples, {"task": TASK, "rows": ROWS}),
    "tasks.write_rows": (tasks.write_rows, {"path": "written.jsonl", "rows": ROWS, "labels": TASK.labels}),
    "tasks.drop_duplicates": (tasks.drop_duplicates, {"rows": ROWS}),
    "tasks.draft_task": (tasks.draft_task, HERE),
    "tasks.task_toml": (tasks.task_toml, {"task": TASK}),
    "tasks.partition": (tasks.partition, {"labels": [0, 1] * 4, "n_devices": 2}),
    "tasks.split_rows": (tasks.split_rows, {"rows": ROWS, "sizes": {"train": 4}}),
    "tasks.write_partition": (
        tasks.write_partition,
        {"folder": "parts", "rows": ROWS, "labels": TASK.labels, "n_devices": 2},
    ),
    "tasks.read_manifest": (tasks.read_manifest, {"folder": "parts"}),
    "tasks.perturb": (
        tasks.perturb,
        {"ids": [1, 2], "keep_tail": 1, "rate": 0.5, "n_vocab": 9, "rng": np.random.default_rng(1)},
    ),
    "tasks.cue_ids": (tasks.cue_ids, {"tokenizer": ToyScorer(), "template": TEMPLATE}),
    "tasks.label_word_ids": (
        tasks.label_word_ids,
        {"tokenizer": ToyScorer(), "template": TEMPLATE, "labels": TASK.labels},
    ),
    "tasks.render_ids": (tasks.render_ids, {"tokenizer": ToyScorer(), "template": TEMPLATE, "text": "a text"}),
    "tasks.word_costs": (tasks.word_costs, {"tokenizer": ToyScorer(), "task": TASK}),
    "tasks.word_notes": (tasks.word_notes, {"tokenizer": ToyScorer(), "task": TASK}),
    "models.fingerprint": (models.fingerprint, {"path": "absent.gguf"}),
    "models.locate": (models.locate, {"name_or_path": "absent.gguf"}),
    "models.pull": (models.pull, {"name": "absent"}),
    "models.remove": (models.remove, {"name": "absent"}),
    "models.requantize": (models.requantize, {"name_or_path": "absent.gguf", "format": "q4_0"}),
    "models.weight_formats": (models.weight_formats, {"path": "absent.gguf"}),
    "models.tensor_shapes": (models.tensor_shapes, {"path": "absent.gguf"}),
    "models.matmul_flops": (models.matmul_flops, {"types": ()}),
    "models.faster_format": (models.faster_format, {"model": "toy", "weights": ()}),
    "models.model_parts": (models.model_parts, {"path": "absent.gguf"}),
    "models.model_size": (models.model_size, {"path": "absent.gguf"}),
    "models.WatchedFiles": (models.WatchedFiles, {"path": "absent.gguf"}),
    "Device": (Device, {"name": "a", "scorer": ToyScorer(), "train_rows": ROWS, "task": TASK}),
    "RunStore": (lambda path: RunStore(path).close(), {"path": "runs.db"}),
    "SideBySide": (SideBySide, {"model": ToyScorer(), "prompt": MADE}),
    "SideBySide.classify": (SideBySide(ToyScorer(), MADE, TASK).classify, {"text": "a text"}),
    "SideBySide.generate": (SideBySide(ToyScorer(), MADE, TASK).generate, {"text": "a text", "max_tokens": 2}),
    "place": (place, {"model": ToyScorer(), "template": TEMPLATE, "text": "a text"}),
    "Generation": (
        Generation,
        {"generator": ToyScorer().generator, "placed": Placed(np.array([1, 2], dtype=np.int32)), "max_tokens": 2},
    ),
    "bench.measure": (measurement.measure, {"scorer": ToyScorer(), "seconds": 0.0, "quick": True}),
    "bench.measure_threads": (
        measurement.measure_threads,
        {"load": lambda _n: ToyScorer(), "counts": [1], "seconds": 0.0},
    ),
    "bench.best_threads": (measurement.best_threads, {"rates": ()}),
}

FETCHES = {"tasks.load_hub", "tasks.bbc_news"}
"""Functions that need a network for valid values."""

NEEDS_A_MODEL = {"NativeScorer"}
"""Tested in `tests.native.test_any_value`."""

SLOW = {
    ("bench.measure", "seconds"),
    ("bench.measure_threads", "seconds"),
    ("bench.measure", "quick"),
    ("bench.measure", "sysfs"),
    ("tune", "budget"),
    ("refine", "budget"),
}
"""Arguments whose valid values make the call slow."""

ANSWERING = {("bench.measure", "kernel_flops"), ("bench.measure_threads", "load"), ("models.faster_format", "measure")}
"""Callbacks whose result is used."""


def parameters() -> Iterator[tuple[str, str]]:
    for name, (call, _) in CALLS.items():
        yield from ((name, parameter) for parameter in inspect.signature(call).parameters if parameter != "options")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "cache"))
    tasks.write_rows("rows.jsonl", ROWS, TASK.labels)
    return tmp_path


@pytest.mark.parametrize(("name", "parameter"), list(parameters()))
def test_any_value_is_used_or_refused_by_its_name(name: str, parameter: str) -> None:
    call, right = CALLS[name]
    values = (object(), [], {}) if (name, parameter) in SLOW else VALUES
    values = [value for value in values if (name, parameter) not in ANSWERING or value is not ignored]
    faults = [fault_of(call, right, parameter, value) for value in values]
    assert "\n".join(fault for fault in faults if fault is not None) == ""


STRUCTS = [name for name, (call, _) in CALLS.items() if isinstance(call, type) and hasattr(call, "__post_init__")]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.just(TEMPLATE)
    | st.just(SPEC),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(STRUCTS))
def test_any_valid_struct_can_be_sent(data: st.DataObject, name: str) -> None:
    made, right = CALLS[name]
    parameter = data.draw(st.sampled_from(list(inspect.signature(made).parameters)))
    value = data.draw(ANYTHING)
    assert fault_of(lambda **given: msgspec.msgpack.encode(made(**given)), right, parameter, value) is None


def test_every_public_function_and_class_is_among_them() -> None:
    public = {name: getattr(fedbpt, name) for name in fedbpt.__all__}
    for module in (tasks, models):
        public |= {
            f"{module.__name__.removeprefix('fedbpt.')}.{name}": getattr(module, name) for name in module.__all__
        }
    results = {
        "EvaluationResult",
        "TuneResult",
        "AnswerComparison",
        "RefineResult",
        "SampledTargets",
        "ModelCheck",
        "Gpu",
        "FedbptError",
    }  # nobody makes them but fedbpt
    results |= {"tasks.Draft", "tasks.Manifest", "tasks.WordCosts", "tasks.Tokenizer"}
    results |= {f"models.{name}" for name in ("CatalogueEntry", "HubFile", "ModelEntry", "PackagedFile", "Requantized")}
    results |= {"models.WeightFormat"}
    # a type alias counts as a class in Python 3.10
    plain = {name: value for name, value in public.items() if get_origin(value) is None}
    callables = {name for name, value in plain.items() if inspect.isroutine(value) or inspect.isclass(value)}
    takes = {name for name in callables - results if inspect.signature(public[name]).parameters}
    known = {*CALLS, *FETCHES, *NEEDS_A_MODEL, "tasks.Task", "tasks.Template"}
    assert takes - known == set()
    assert all(hasattr(public[name], "__wrapped__") for name in FETCHES)


@pytest.mark.parametrize(
    ("make", "field", "values"),
    [
        (
            lambda: PromptSpec(placement="fornt"),
            "placement",
            ["PromptSpec", "'front'", "'first'", "'cue'", "'fornt'"],
        ),
        (lambda: PromptSpec(sigma0=1e-300), "sigma0", ["0.0001", "10,000", "1e-300"]),
        (lambda: PromptSpec(seed=-1), "seed", ["from 0 to 2^63 - 1", "-1"]),
        (lambda: ObjectiveSpec(batch_size=True), "batch_size", ["ObjectiveSpec", "True"]),
        (lambda: Template(pattern="{text} so", label_words="ab"), "label_words", ["a list", "a str"]),
        (lambda: RunSettings(prompt={"d": 6}), "prompt", ["a PromptSpec", "a dict"]),
        (lambda: Budget(seconds=np.float32("nan")), "seconds", ["above 0", "None", "nan"]),
    ],
)
def test_a_wrong_field_is_named_with_what_is_expected_and_what_was_given(
    make: Callable[[], object], field: str, values: list[str]
) -> None:
    with raises(ConfigError, field=field) as caught:
        make()
    assert [value for value in [field, *values] if value not in str(caught.value)] == []


def test_numpy_numbers_and_lists_become_python_numbers_and_tuples() -> None:
    spec = PromptSpec(d=np.int64(6), alpha=np.float32(0.5), seed=np.uint64(3))
    assert (spec, type(spec.d), type(spec.alpha)) == (PromptSpec(d=6, seed=3), int, float)
    assert Template(pattern="{text} so", label_words=["a", "b"]).label_words == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"scorer": "smollm2-135m"}, ["fedbpt.load_model(NAME)", "'smollm2-135m'"]),
        ({"task": "support.toml"}, ["support.toml"]),
        ({"prompt": PromptSpec(d=4, n_prompt=50)}, ["n_prompt", "50", "6 tokens"]),
        ({"prompt": PromptSpec(d=4, n_prompt=500, placement="front")}, ["n_prompt", "500", "context"]),
        ({"objective": ObjectiveSpec(max_text_tokens=600), "test": [("x" * 600, 0)]}, ["context", "512"]),
        ({"dev": [("", 0)]}, ["dev: row 0: "]),
        ({"sead": 3}, ["'sead'"]),
    ],
)
def test_a_tuning_that_cannot_work_is_refused_before_anything_is_scored(
    changes: dict[str, Any], values: list[str]
) -> None:
    call, right = CALLS["tune"]
    scorer = ToyScorer()
    with pytest.raises(FedbptError) as caught:
        call(**{**right, "scorer": scorer, **changes})
    assert [value for value in values if value not in str(caught.value)] == []
    assert "resume" not in str(caught.value)
    assert scorer.calls == []


@pytest.mark.parametrize("make", [PromptSpec, ObjectiveSpec, RunSettings, Budget, Sampling])
def test_an_unknown_field_is_named_along_with_those_that_exist(make: Any) -> None:
    with raises(ConfigError) as caught:
        make(placment="cue")
    known = list(get_type_hints(make))
    assert [name for name in [make.__name__, "'placment'", *known] if name not in str(caught.value)] == []


def test_a_task_may_be_given_by_its_name_or_file(folder: Path) -> None:
    (folder / "mood.toml").write_text(tasks.task_toml(TASK))
    found = [fedbpt.evaluate(ToyScorer(), task, ROWS).loss for task in (TASK, "mood.toml", folder / "mood.toml")]
    assert len(set(found)) == 1


def test_an_error_never_quotes_what_may_be_a_row() -> None:
    with pytest.raises(FedbptError) as caught:
        tasks.drop_duplicates([("a secret", 0), "another secret"])
    assert "secret" not in str(caught.value)
    with pytest.raises(FedbptError) as caught:
        fedbpt.evaluate(ToyScorer(), TASK, ROWS, prompt="a secret")
    assert "secret" not in caught.value.public
