"""The prompt artefact: saving and loading are inverse, and a wrong file or model is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt.errors import InputError, PromptError
from fedbpt.prompts.prompt import FORMAT, LAYERS_FORMAT, SHIFTS_FORMAT, Prompt
from fedbpt.protocol.specs import Array, Dtype, LayerReadout, PromptSpec, Template
from fedbpt.tasks import BUILTIN, Task
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer


def make(**changes: object) -> Prompt:
    scorer = ToyScorer()
    fields: dict = {
        "rows": np.random.default_rng(0).standard_normal((2, 8)),
        "spec": PromptSpec(n_prompt=2, d=20, seed=3),
        "task_name": "mood",
        "labels": ("bad", "good"),
        "template": Template(pattern="{text}\nMood:", label_words=(" bad", " good")),
        "model_fingerprint": scorer.fingerprint,
        "model_name": "toy",
        "architecture": "toy",
        "history": ({"round": 1, "loss": 0.5},),
        "label_bias": np.array([0.25, -0.25]),
    }
    return Prompt(**{**fields, **changes})


def test_a_prompt_survives_the_disk(tmp_path: Path) -> None:
    prompt = make()
    saved = prompt.save(tmp_path / "p.safetensors")
    loaded = Prompt.load(saved)
    assert loaded == prompt
    assert loaded.rows.tobytes() == prompt.rows.tobytes()
    assert {p.name for p in tmp_path.iterdir()} == {"p.safetensors", "p.safetensors.md"}


READOUT = {"word_ids": np.array([7, 3, 3]), "word_weights": np.array([[0.5, -0.5], [1.0, 0.25], [0.0, 2.0]])}


def test_a_prompt_with_a_readout_survives_the_disk(tmp_path: Path) -> None:
    prompt = make(**READOUT)
    loaded = Prompt.load(prompt.save(tmp_path / "p.safetensors"))
    assert loaded == prompt
    assert loaded.word_ids.tolist() == [7, 3, 3]
    assert loaded.word_weights.tobytes() == prompt.word_weights.tobytes()
    assert loaded.readout == prompt.readout
    assert loaded.readout.weights.numpy().tolist() == [[0.25, -0.25], [0.5, -0.5], [1.0, 0.25], [0.0, 2.0]]


def test_a_prompt_without_a_readout_has_only_a_bias_and_no_words_in_its_file(tmp_path: Path) -> None:
    prompt = make()
    assert prompt.readout.weights.numpy().tolist() == [[0.25, -0.25]]
    saved = prompt.save(tmp_path / "p.safetensors")
    assert set(safetensors.numpy.load(saved.read_bytes())) == {"rows", "label_bias"}


@pytest.mark.parametrize("part", READOUT)
def test_prompts_that_differ_in_the_readout_are_not_equal(part: str) -> None:
    changed = READOUT[part].copy()
    changed[0] += 1
    assert make(**READOUT) == make(**READOUT)
    assert make(**READOUT) != make(**{**READOUT, part: changed})
    assert make(**READOUT) != make()


def test_a_file_with_half_a_readout_is_refused(tmp_path: Path) -> None:
    path = make(**READOUT).save(tmp_path / "p.safetensors")
    tensors = safetensors.numpy.load(path.read_bytes())
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    metadata = json.loads(header)["__metadata__"]
    del tensors["word_ids"]
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    with raises(PromptError, field=""):
        Prompt.load(path)


def altered(path: Path, header: dict[str, object] | None = None, **tensors: np.ndarray | None) -> Path:
    """Replace tensors (None: remove) and header fields of the file."""
    content = path.read_bytes()
    found = {**safetensors.numpy.load(content), **tensors}
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["fedbpt"]
    metadata = {"fedbpt": json.dumps({**json.loads(text), **(header or {})})}
    kept = {name: array for name, array in found.items() if array is not None}
    path.write_bytes(safetensors.numpy.save(kept, metadata=metadata))
    return path


OTHERS: dict = {
    **READOUT,
    "others": (
        Template(pattern="Review: {text}\nIt was:", label_words=(" poor", " great")),
        Template(pattern="{text} (", label_words=("n", "y")),
    ),
    "other_weights": np.arange(16).reshape(2, 4, 2) / 8,
}


def test_a_prompt_with_other_templates_survives_the_disk(tmp_path: Path) -> None:
    prompt = make(**OTHERS)
    loaded = Prompt.load(prompt.save(tmp_path / "p.safetensors"))
    assert loaded == prompt
    assert loaded.others == OTHERS["others"]
    assert loaded.other_weights.tobytes() == OTHERS["other_weights"].astype(np.float32).tobytes()
    assert loaded.readout == prompt.readout
    assert [array.numpy().tolist() for array in loaded.readout.others] == OTHERS["other_weights"].tolist()


def test_a_prompt_whose_other_templates_have_only_a_bias_survives_the_disk(tmp_path: Path) -> None:
    prompt = make(others=OTHERS["others"], other_weights=OTHERS["other_weights"][:, :1])
    loaded = Prompt.load(prompt.save(tmp_path / "p.safetensors"))
    assert loaded == prompt
    assert loaded.word_ids.shape == (0,)
    assert [array.shape for array in loaded.readout.others] == [(1, 2), (1, 2)]


@pytest.mark.parametrize("given", [{}, READOUT], ids=["bias", "readout"])
def test_a_prompt_without_other_templates_has_none_in_its_file(tmp_path: Path, given: dict) -> None:
    path = make(**given).save(tmp_path / "p.safetensors")
    assert "other_weights" not in safetensors.numpy.load(path.read_bytes())
    for file in (path, altered(path, {"others": []})):
        loaded = Prompt.load(file)
        assert (loaded.others, loaded.other_weights.size, loaded.readout.others) == ((), 0, ())
        assert loaded == make(**given)


def test_a_file_of_a_version_without_other_templates_still_loads(tmp_path: Path) -> None:
    path = make(**READOUT).save(tmp_path / "p.safetensors")
    content = path.read_bytes()
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["fedbpt"]
    old = {name: value for name, value in json.loads(text).items() if name != "others"}
    assert "others" in json.loads(text)
    tensors = safetensors.numpy.load(content)
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"fedbpt": json.dumps(old)}))
    assert Prompt.load(path) == make(**READOUT)


MOOD = Task(
    name="mood",
    labels=("bad", "good"),
    templates=(Template(pattern="{text}\nMood:", label_words=(" bad", " good")), OTHERS["others"][0]),
    max_text_tokens=17,
    max_words=9,
    text_columns=("review", "{title} {body}"),
    label_column="stars",
)


def as_of_format_1(path: Path) -> Path:
    """Rewrite the file as the previous version did, with only the task's name and labels."""
    content = path.read_bytes()
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["fedbpt"]
    header = {name: value for name, value in json.loads(text).items() if name != "task"}
    metadata = {"fedbpt": json.dumps({**header, "format": 1})}
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(content), metadata=metadata))
    return path


def test_a_prompt_carries_its_whole_task(tmp_path: Path) -> None:
    prompt = make(task=MOOD)
    assert Prompt.load(prompt.save(tmp_path / "p.safetensors")).task == MOOD
    assert prompt != make()
    assert prompt.with_rows(prompt.rows + 1, ()).task == MOOD


def test_a_file_of_format_1_gets_its_task_only_if_it_is_built_in(tmp_path: Path) -> None:
    own = Prompt.load(as_of_format_1(make(task=MOOD, **OTHERS).save(tmp_path / "own.safetensors")))
    assert own == make(**OTHERS)
    assert own.task is None
    sst_2 = BUILTIN["sst-2"]
    built_in = make(task_name="sst-2", labels=sst_2.labels, task=sst_2)
    assert Prompt.load(as_of_format_1(built_in.save(tmp_path / "sst.safetensors"))) == built_in
    namesake = make(task_name="sst-2", task=Task(name="sst-2", labels=MOOD.labels, templates=MOOD.templates))
    assert Prompt.load(as_of_format_1(namesake.save(tmp_path / "namesake.safetensors"))).task is None


def test_a_newer_format_is_refused_with_its_number(tmp_path: Path) -> None:
    new = {"new_tensor": np.zeros(1, np.float32)}
    path = altered(make().save(tmp_path / "p.safetensors"), {"format": 5, "what_there_will_be": 1}, **new)
    with raises(PromptError, field="format", limit=SHIFTS_FORMAT) as refused:
        Prompt.load(path)
    assert "format 5" in str(refused.value)


def header_of(path: Path) -> dict[str, Any]:
    """The JSON object in the file's metadata."""
    content = path.read_bytes()
    text = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["fedbpt"]
    found: dict[str, Any] = json.loads(text)
    return found


def of_layers(dtype: Dtype = "<f2", **changes: Any) -> dict[str, Any]:
    """Arguments of `make` for a prompt that reads two layers under two templates."""
    weights = np.random.default_rng(1).standard_normal((2, 2, 8, 2))
    fields: dict[str, Any] = {
        "layers": (3, 5),
        "weights": Array.of(weights, dtype),
        "word_scales": Array.of(np.array([0.5, 0.0]), "<f4"),
        "bias": Array.of(np.array([0.125, -0.25]), "<f4"),
        "others": OTHERS["others"][:1],
    }
    return {"label_bias": None, "layer_readout": LayerReadout(**{**fields, **changes})}


def test_a_prompt_that_reads_layers_survives_the_disk(tmp_path: Path) -> None:
    prompt = make(**of_layers())
    path = prompt.save(tmp_path / "p.safetensors")
    loaded = Prompt.load(path)
    assert loaded == prompt
    assert loaded.layer_readout == of_layers()["layer_readout"]
    assert loaded.to_bytes() == path.read_bytes()
    tensors = safetensors.numpy.load(path.read_bytes())
    assert {name: (str(array.dtype), array.shape) for name, array in tensors.items()} == {
        "rows": ("float32", (2, 8)),
        "label_bias": ("float32", (2,)),
        "layer_weights": ("float16", (2, 2, 8, 2)),
        "word_scales": ("float32", (2,)),
    }
    assert tensors["label_bias"].tolist() == [0.125, -0.25]


def test_weights_of_layers_are_rounded_as_in_the_file(tmp_path: Path) -> None:
    prompt = make(**of_layers("<f8"))
    assert Prompt.load(prompt.save(tmp_path / "p.safetensors")) == prompt == make(**of_layers("<f2"))


def test_only_a_prompt_that_reads_layers_needs_a_reader_of_format_3(tmp_path: Path) -> None:
    words = header_of(make(**OTHERS).save(tmp_path / "words.safetensors"))
    layers = header_of(make(**of_layers()).save(tmp_path / "layers.safetensors"))
    assert (words["format"], layers["format"]) == (FORMAT, LAYERS_FORMAT) == (2, 3)
    new = {"layers", "layer_templates"}  # readers of format 2 refuse fields that they do not know
    assert set(layers) - set(words) == new
    assert not new & set(words)
    assert layers["layers"] == [3, 5]
    assert [template["pattern"] for template in layers["layer_templates"]] == [OTHERS["others"][0].pattern]


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (3, 6)},
        {"weights": Array.of(np.zeros((2, 2, 8, 2)), "<f2")},
        {"word_scales": Array.of(np.array([0.5, 1.0]), "<f4")},
        {"bias": Array.of(np.zeros(2), "<f4")},
        {"others": OTHERS["others"][1:]},
    ],
)
def test_prompts_that_read_layers_otherwise_are_not_equal(changes: dict) -> None:
    assert make(**of_layers()) == make(**of_layers())
    assert make(**of_layers()) != make(**of_layers(**changes))
    assert make(**of_layers()) != make(label_bias=None)


def test_other_rows_keep_the_readout_of_layers() -> None:
    prompt = make(**of_layers())
    changed = prompt.with_rows(prompt.rows + 1, ({"imported_from": "elsewhere"},))
    assert changed.layer_readout == prompt.layer_readout
    assert changed.history == ({"imported_from": "elsewhere"},)
    assert changed.with_rows(prompt.rows, prompt.history) == prompt


def test_a_notebook_shows_which_layers_are_read() -> None:
    assert "layers 3, 5, 2 template(s)" in make(**of_layers())._repr_html_()
    assert "layers" not in make(**OTHERS)._repr_html_()
    assert "3 words, 3 template(s)" in make(**OTHERS)._repr_html_()
    assert "2 x 8 cue" in repr(make(**of_layers()))


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"layers": []}, {}),
        ({"layers": [3]}, {}),
        ({"layers": [5, 3]}, {}),
        ({"layers": [3, 3]}, {}),
        ({"layers": [-1, 3]}, {}),
        ({"layers": "all"}, {}),
        ({"layer_templates": []}, {}),
        ({"layer_templates": [{"pattern": "{text} (", "label_words": ["n"]}]}, {}),
        ({}, {"layer_weights": None}),
        ({}, {"layer_weights": None, "word_scales": None}),
        ({}, {"word_scales": None}),
        ({}, {"layer_weights": np.zeros((2, 2, 7, 2), np.float16)}),
        ({}, {"layer_weights": np.zeros((2, 32), np.float16)}),
        ({}, {"layer_weights": np.array(1, np.float16)}),
        ({}, {"layer_weights": np.full((2, 2, 8, 2), np.nan, np.float16)}),
        ({}, {"layer_weights": np.full((2, 2, 8, 2), 1e6, np.float32)}),
        ({}, {"word_scales": np.zeros(3, np.float32)}),
        ({}, {"word_scales": np.array([np.inf, 0], np.float32)}),
        ({}, {"label_bias": np.zeros(3, np.float32)}),
        ({}, {"label_bias": np.full(2, np.nan, np.float32)}),
        ({"others": [{"pattern": "{text} (", "label_words": ["n", "y"]}]}, {}),
    ],
    ids=lambda value: ",".join(value) or "-",
)
def test_a_file_with_a_damaged_readout_of_layers_is_one_line(tmp_path: Path, header: dict, tensors: dict) -> None:
    path = altered(make(**of_layers()).save(tmp_path / "p.safetensors"), header, **tensors)
    with raises(PromptError) as refused:
        Prompt.load(path)
    assert "p.safetensors" in str(refused.value)


def test_a_file_whose_layers_are_not_named_is_refused(tmp_path: Path) -> None:
    whole = make(**of_layers()).save(tmp_path / "p.safetensors")
    header = {name: value for name, value in header_of(whole).items() if name != "layers"}
    tensors = safetensors.numpy.load(whole.read_bytes())
    whole.write_bytes(safetensors.numpy.save(tensors, metadata={"fedbpt": json.dumps(header)}))
    with raises(PromptError):
        Prompt.load(whole)


@pytest.mark.parametrize(
    "changes", [{"label_bias": np.array([0.25, -0.25])}, READOUT, {k: OTHERS[k] for k in ("others", "other_weights")}]
)
def test_a_prompt_reads_either_layers_or_words(changes: dict) -> None:
    if "other_weights" in changes:
        changes = {**changes, "other_weights": changes["other_weights"][:, :1]}
    with raises(InputError, field="layer_readout"):
        make(**{**of_layers(), **changes})


@pytest.mark.parametrize("changes", [{"name": "other"}, {"labels": ("good", "bad")}])
def test_a_prompt_of_another_task_is_refused(tmp_path: Path, changes: dict) -> None:
    other = msgspec.structs.replace(MOOD, **changes)
    with raises(InputError, field="task"):
        make(task=other)
    path = altered(make(task=MOOD).save(tmp_path / "p.safetensors"), {"task": msgspec.to_builtins(other)})
    with raises(PromptError, field="task"):
        Prompt.load(path)


def test_prompts_that_differ_in_their_other_templates_are_not_equal() -> None:
    changed = OTHERS["other_weights"].copy()
    changed[1, 3, 1] += 1
    assert make(**OTHERS) == make(**OTHERS)
    assert make(**OTHERS) != make(**{**OTHERS, "other_weights": changed})
    assert make(**OTHERS) != make(**{**OTHERS, "others": OTHERS["others"][::-1]})
    assert make(**OTHERS) != make(**READOUT)


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"others": []}, {}),
        ({}, {"other_weights": None}),
        ({}, {"other_weights": np.zeros((1, 4, 2), np.float32)}),
        ({}, {"other_weights": np.zeros((2, 3, 2), np.float32)}),
        ({}, {"other_weights": np.zeros((2, 4, 3), np.float32)}),
        ({}, {"other_weights": np.zeros((2, 8), np.float32)}),
        ({}, {"other_weights": np.array(1, np.float32)}),
        ({}, {"other_weights": np.full((2, 4, 2), np.inf, np.float32)}),
        ({}, {"word_ids": np.array(1, np.int32)}),
        ({"others": [{"pattern": "{text}", "label_words": [" a"]}] * 2}, {}),
        ({"others": "none"}, {}),
    ],
    ids=[
        "no templates",
        "no weights",
        "too few",
        "other words",
        "other labels",
        "flat",
        "a number",
        "infinity",
        "word ids that are a number",
        "a label word too few",
        "not a list",
    ],
)
def test_a_file_with_damaged_other_templates_is_one_line(tmp_path: Path, header: dict, tensors: dict) -> None:
    path = altered(make(**OTHERS).save(tmp_path / "p.safetensors"), header, **tensors)
    with raises(PromptError) as refused:
        Prompt.load(path)
    assert "p.safetensors" in str(refused.value)


def test_a_file_with_other_templates_but_no_words_is_refused(tmp_path: Path) -> None:
    path = altered(make(**OTHERS).save(tmp_path / "p.safetensors"), word_ids=None, word_weights=None)
    with raises(PromptError, field=""):
        Prompt.load(path)


@settings(deadline=None)
@given(text=st.text(max_size=40).filter(lambda s: s.isprintable()))
def test_any_text_survives_in_the_metadata(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("p") / "p.safetensors"
    prompt = make(task_name=text, template=Template(pattern=text + "{text}\n", label_words=(text + "a", text + "b")))
    prompt.save(path)
    assert Prompt.load(path) == prompt


def test_the_label_bias_is_zero_unless_given() -> None:
    assert make(label_bias=None).label_bias.tolist() == [0, 0]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = make().save(tmp_path / "a"), make().save(tmp_path / "b")
    assert one.read_bytes() == other.read_bytes()


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with raises(PromptError, field="path") as refused:
        Prompt.load(tmp_path / "none.safetensors")
    assert "none.safetensors" in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"hello, I am text", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(content)
    with raises(PromptError):
        Prompt.load(path)


@pytest.mark.parametrize("keep", [4, 60, 300, -1])
def test_a_file_cut_short_is_one_line(tmp_path: Path, keep: int) -> None:
    path = make().save(tmp_path / "p.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with raises(PromptError) as refused:
        Prompt.load(path)
    assert "p.safetensors" in str(refused.value)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "x"},
        {"fedbpt": "{"},
        {"fedbpt": "[]"},
        {"fedbpt": '{"format": 1}'},
        {"fedbpt": '{"format": 99}'},
    ],
)
def test_missing_or_odd_metadata_is_one_line(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "p.safetensors"
    tensors = {"rows": np.zeros((2, 8), np.float32), "label_bias": np.zeros(2, np.float32)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    with raises(PromptError):
        Prompt.load(path)


def test_a_file_with_nan_is_damaged(tmp_path: Path) -> None:
    path = make().save(tmp_path / "p.safetensors")
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(bytes(content))
    with raises(PromptError):
        Prompt.load(path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with raises(PromptError, field="path"):
        make().save(tmp_path / "no" / "p.safetensors")


def test_the_right_model_passes() -> None:
    make().check(ToyScorer())


def test_the_wrong_model_is_refused_by_name() -> None:
    with raises(PromptError, field="model_fingerprint") as refused:
        make().check(ToyScorer(seed=1, name="other-7b"))
    assert "toy" in str(refused.value)
    assert "other-7b" in str(refused.value)


def test_the_callers_rows_are_copied() -> None:
    rows = np.ones((2, 8), dtype=np.float32)
    prompt = make(rows=rows)
    rows[:] = 0
    assert (prompt.rows == 1).all()


def test_its_repr_names_task_and_shape() -> None:
    assert "mood" in repr(make())
    assert "2 x 8 cue" in repr(make())


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("rows", {"rows": np.zeros((3, 8))}),
        ("rows", {"rows": np.zeros(8)}),
        ("rows", {"rows": np.full((2, 8), np.nan)}),
        ("label_bias", {"label_bias": np.zeros(3)}),
        ("label_words", {"labels": ("only",), "label_bias": None}),
        ("word_weights", {"word_ids": READOUT["word_ids"]}),
        ("word_weights", {"word_weights": READOUT["word_weights"]}),
        ("word_weights", {**READOUT, "word_ids": np.array([1, 2])}),
        ("word_weights", {**READOUT, "word_ids": np.array([[1, 2, 3]])}),
        ("word_weights", {**READOUT, "word_weights": np.zeros((3, 3))}),
        ("word_weights", {**READOUT, "word_weights": np.full((3, 2), np.nan)}),
        ("other_weights", {**OTHERS, "others": ()}),
        ("other_weights", {**READOUT, "others": OTHERS["others"]}),
        (
            "label_words",
            {**OTHERS, "others": (OTHERS["others"][0], Template(pattern="{text}", label_words=("a", "b", "c")))},
        ),
        ("other_weights", {**OTHERS, "other_weights": OTHERS["other_weights"][:, :3]}),
        ("other_weights", {**OTHERS, "other_weights": np.full((2, 4, 2), np.nan)}),
        ("label_words", {"template": Template(pattern="{text}", label_words=("a",))}),
        ("history", {"history": ({"x": object()},)}),
        ("history", {"history": ({"x": float("nan")},)}),
    ],
)
def test_invalid_arguments_are_refused(field: str, changes: dict) -> None:
    with raises(InputError, field=field):
        make(**changes)
