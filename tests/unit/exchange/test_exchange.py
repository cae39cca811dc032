"""Export and import of prompts in other programs' formats, to the bit.

That PEFT itself gives the same logits is tested in `tests.native.test_peft`.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedbpt import Prompt, PromptSpec, evaluate, export_prompt, import_prompt
from fedbpt.errors import ConfigError, FedbptError, InputError, MissingExtraError, PromptError
from fedbpt.prompts.prompt import card_path, layer_tensors
from fedbpt.protocol.specs import Placement, Shift
from fedbpt.tasks import Task
from tests.support.raises import raises
from tests.support.toy_scorer import BOS, ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.prompts.test_prompt import OTHERS, READOUT, make, of_layers


class Llama(ToyScorer):
    """The toy model, under the name of a supported architecture."""

    architecture = "llama"


MOOD = Task(name="mood", labels=make().labels, templates=(make().template,))
WHOLE = {"plain": {}, "readout": READOUT, "others": OTHERS, "layers": of_layers()}


def exported(folder: Path, prompt: Prompt) -> Path:
    return export_prompt(prompt, folder / "adapter", "peft", scorer=Llama(), task=MOOD, base_model="someone/toy").path


def imported(folder: Path, **changes: Any) -> Prompt:
    return import_prompt(folder, **{"scorer": Llama(), "task": MOOD, **changes})


# --- out -------------------------------------------------------------------------------------------------------------


def test_npy_has_the_rows(tmp_path: Path) -> None:
    prompt = make()
    found = np.load(export_prompt(prompt, tmp_path / "rows.npy", "npy").path)
    assert found.dtype == np.float32
    assert found.shape == (prompt.n_prompt, prompt.n_embd)
    assert found.tobytes() == prompt.rows.tobytes()


@pytest.mark.parametrize("to", ["gguf", "npy"])
@pytest.mark.parametrize(("architecture", "says"), [("granite", True), ("gemma2", False)])
def test_rows_in_another_scale_than_transformers_say_so(tmp_path: Path, to: Any, architecture: str, says: bool) -> None:
    prompt = make(label_bias=None, architecture=architecture)
    done = export_prompt(prompt, tmp_path / "rows", to)
    assert any("inputs_embeds" in note for note in done.notes) is says
    assert ("inputs_embeds" in card_path(done.path).read_text()) is says


@pytest.mark.parametrize(
    ("prompt", "n"),
    [(make(), 1), (make(**READOUT), 1), (make(**of_layers()), 1), (make(label_bias=None), 0)],
    ids=["bias", "readout", "layers", "rows"],
)
def test_npy_notes_what_it_omits(tmp_path: Path, prompt: Prompt, n: int) -> None:
    done = export_prompt(prompt, tmp_path / "rows.npy", "npy")
    assert len(done.notes) == n
    assert all(note in card_path(done.path).read_text() for note in done.notes)


@pytest.mark.parametrize("kind", WHOLE)
def test_gguf_has_all_of_the_prompt(tmp_path: Path, kind: str) -> None:
    prompt = make(**WHOLE[kind])
    done = export_prompt(prompt, tmp_path / "prompt.gguf", "gguf")
    reader = gguf.GGUFReader(done.path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    wanted = {"soft_prompt.weight": prompt.rows}
    wanted |= {name: getattr(prompt, name) for name in ("label_bias", "word_ids", "word_weights", "other_weights")}
    wanted |= {} if prompt.layer_readout is None else layer_tensors(prompt.layer_readout)
    assert set(tensors) == {name for name, values in wanted.items() if values.size}
    assert all(values.tobytes() == wanted[name].tobytes() for name, values in tensors.items())
    assert all(values.shape == wanted[name].shape for name, values in tensors.items())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == prompt.architecture
    assert fields["adapter.type"] == "soft_prompt"
    assert fields["fedbpt.placement"] == "cue"
    assert fields["fedbpt.model.fingerprint"] == prompt.model_fingerprint
    others = prompt.others if prompt.layer_readout is None else prompt.layer_readout.others
    assert fields["fedbpt.templates"] == [template.pattern for template in (prompt.template, *others)]
    assert fields.get("fedbpt.layers") == (None if prompt.layer_readout is None else [3, 5])
    assert len(fields["fedbpt.label_words"]) == 2 * (1 + len(others))
    assert fields["fedbpt.labels"] == list(prompt.labels)
    assert fields["fedbpt.label_words"][:2] == list(prompt.template.label_words)
    assert "fedbpt.task.definition" not in fields
    done = export_prompt(make(task=MOOD, task_name=MOOD.name), tmp_path / "with-task.gguf", "gguf")
    definition = gguf.GGUFReader(done.path).fields["fedbpt.task.definition"].contents()
    assert msgspec.json.decode(definition, type=Task) == MOOD


def shifting(*layers: int) -> Prompt:
    """A prompt that adds a row to the output of each of ``layers``."""
    placement: Any = "layers" if len(layers) > 1 else "layer"
    spec = PromptSpec(placement=placement).shifting(Shift(layers=layers, sizes=(1.0,) * len(layers)))
    drawn = np.random.default_rng(0).standard_normal((len(layers), make().n_embd)).astype(np.float32)
    return make(spec=spec, rows=drawn)


@pytest.mark.parametrize(("layers", "written"), [((2,), (2,)), ((0, 1, 2), (1, 2))])
def test_a_prompt_that_shifts_layers_becomes_a_control_vector(
    tmp_path: Path, layers: tuple[int, ...], written: tuple[int, ...]
) -> None:
    """llama.cpp reads a vector of float32 for each direction.N, from layer 1 on, and refuses any other tensor."""
    prompt = shifting(*layers)
    done = export_prompt(prompt, tmp_path / "prompt.gguf", "gguf")
    reader = gguf.GGUFReader(done.path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {f"direction.{layer}" for layer in written}
    for layer in written:
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [prompt.n_embd]
        assert tensor.data.tobytes() == prompt.rows[layers.index(layer)].tobytes()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == prompt.architecture
    assert fields["controlvector.layer_count"] == len(written)
    card = card_path(done.path).read_text()
    assert ("layer 0" in " ".join(done.notes)) == ("layer 0" in card) == (0 in layers)
    assert "every token" in done.notes[0]
    assert "every" in card


def test_a_shift_of_layer_0_alone_cannot_be_a_control_vector(tmp_path: Path) -> None:
    with raises(PromptError):
        export_prompt(shifting(0), tmp_path / "prompt.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["npy", "gguf"])
def test_an_export_writes_only_a_file_and_its_card(tmp_path: Path, to: Any) -> None:
    path = export_prompt(make(), tmp_path / f"p.{to}", to).path
    assert {found.name for found in tmp_path.iterdir()} == {path.name, f"{path.name}.md"}
    assert "# mood" in card_path(path).read_text()


def test_an_adapter_holds_the_rows_as_virtual_tokens(tmp_path: Path) -> None:
    folder = exported(tmp_path, make())
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "PROMPT_TUNING"
    assert (config["num_virtual_tokens"], config["token_dim"]) == tensors["prompt_embeddings"].shape == (2, 8)
    assert config["base_model_name_or_path"] == "someone/toy"
    assert tensors["prompt_embeddings"].tobytes() == make().rows.tobytes()
    assert Prompt.load(folder / "prompt.safetensors") == make()


def test_in_front_of_a_model_with_bos_the_first_virtual_token_is_bos(tmp_path: Path) -> None:
    prompt = make(spec=PromptSpec(placement="front", n_prompt=2, d=1))
    tensors = safetensors.numpy.load_file(exported(tmp_path, prompt) / "adapter_model.safetensors")
    assert np.array_equal(tensors["prompt_embeddings"][0], Llama().token_embeddings([BOS])[0])
    assert np.array_equal(tensors["prompt_embeddings"][1:], prompt.rows)


@pytest.mark.parametrize(
    ("placement", "kind", "said"),
    [
        ("cue", "plain", ["README.md's code, not PEFT's generate()", "no label bias"]),
        ("front", "readout", ["The first virtual token is BOS", "no readout"]),
        ("first", "others", ["no readout"]),
        ("first", "layers", ["no readout"]),
    ],
)
def test_an_export_notes_the_limits_of_peft(tmp_path: Path, placement: Placement, kind: str, said: list[str]) -> None:
    prompt = make(spec=PromptSpec(placement=placement, n_prompt=2, d=1), **WHOLE[kind])
    done = export_prompt(prompt, tmp_path / "a", "peft", scorer=Llama(), task=MOOD, base_model="toy")
    assert len(done.notes) == len(said)
    assert all(part in note for part, note in zip(said, done.notes, strict=True))
    assert all(note in (tmp_path / "a" / "README.md").read_text() for note in done.notes)


def test_the_code_in_an_adapters_readme_is_python(tmp_path: Path) -> None:
    for placement, kind in itertools.product(("cue", "front", "first"), WHOLE.values()):
        prompt = make(spec=PromptSpec(placement=placement, n_prompt=2, d=1), **kind)
        text = (exported(tmp_path, prompt) / "README.md").read_text()
        compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_an_adapter_may_be_overwritten_but_not_other_files(tmp_path: Path) -> None:
    exported(tmp_path, make())
    exported(tmp_path, make())
    (tmp_path / "README.md").write_text("mine")
    with raises(PromptError, field="out"):
        export_prompt(make(), tmp_path, "peft", scorer=Llama(), task=MOOD, base_model="toy")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "error", "field", "value"),
    [
        ({"to": "onnx"}, InputError, "to", "'peft', 'gguf', 'npy', got 'onnx'"),
        ({"scorer": None}, ConfigError, "scorer", ""),
        ({"task": None}, ConfigError, "task", ""),
        ({"task": TASK}, ConfigError, "task", str(list(TASK.labels))),
        ({"scorer": Llama(seed=1, name="other")}, PromptError, None, "other"),
        ({"scorer": ToyScorer()}, PromptError, None, "toy"),
        ({"base_model": None}, ConfigError, "base_model", "--base"),
    ],
)
def test_an_export_that_cannot_work_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[FedbptError], field: str | None, value: str
) -> None:
    given = {"to": "peft", "scorer": Llama(), "task": MOOD, "base_model": "toy", **changes}
    with raises(error) as caught:
        export_prompt(make(), tmp_path / "out", **given)
    assert value in str(caught.value)
    assert field is None or caught.value.field == field
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["npy", "gguf", "peft"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, to: Any) -> None:
    (tmp_path / "file").write_text("x")
    with raises(PromptError) as caught:
        export_prompt(make(), tmp_path / "file" / "out", to, scorer=Llama(), task=MOOD, base_model="toy")
    assert str(tmp_path / "file" / "out") in str(caught.value)


def test_gguf_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"fedbpt\[gguf\]"):
        export_prompt(make(), tmp_path / "p.gguf", "gguf")


# --- in --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["cue", "front", "first"])
@pytest.mark.parametrize("kind", WHOLE)
def test_what_was_exported_comes_back_to_the_bit(tmp_path: Path, placement: Placement, kind: str) -> None:
    prompt = make(spec=PromptSpec(placement=placement, n_prompt=2, d=7, seed=3), **WHOLE[kind])
    back = imported(exported(tmp_path, prompt))
    assert back == prompt
    assert back.rows.tobytes() == prompt.rows.tobytes()
    assert back.to_bytes() == prompt.to_bytes()


def retrain(folder: Path, change: Any) -> Path:
    """Change the adapter as further training with PEFT would."""
    path = folder / "adapter_model.safetensors"
    values = safetensors.numpy.load_file(path)["prompt_embeddings"]
    safetensors.numpy.save_file({"prompt_embeddings": change(values.copy())}, path)
    return folder


def test_an_adapter_that_was_trained_further_has_the_new_rows_and_no_figures_of_the_old(tmp_path: Path) -> None:
    prompt = make(history=({"run": "r", "tuned_accuracy": 0.9},), **READOUT)
    back = imported(retrain(exported(tmp_path, prompt), lambda values: values + 1))
    assert np.array_equal(back.rows, prompt.rows + 1)
    assert back.readout == prompt.readout
    assert back.template == prompt.template
    assert [entry.get("tuned_accuracy") for entry in back.history] == [None]


def test_an_adapter_whose_bos_was_trained_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, make(spec=PromptSpec(placement="front", n_prompt=2, d=1)))
    with raises(PromptError) as caught:
        imported(retrain(folder, lambda values: values + 1))

    assert "BOS" in str(caught.value)


def foreign(folder: Path, values: np.ndarray, **changes: Any) -> Path:
    """Write an adapter as other programs do."""
    folder.mkdir()
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": len(values), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({"prompt_embeddings": values}, folder / "adapter_model.safetensors")
    return folder


VALUES = np.random.default_rng(3).standard_normal((3, 8)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_foreign_adapters_rows_are_taken_to_the_bit(tmp_path: Path, dtype: Any) -> None:
    folder = foreign(tmp_path / "a", VALUES.astype(dtype), base_model_name_or_path="someone/toy", peft_version="0.18")
    prompt = imported(folder, task=TASK, template=1)
    assert np.array_equal(prompt.rows, VALUES.astype(dtype).astype(np.float32))
    assert prompt.template == TASK.templates[1]
    assert prompt.history == ({"imported_from": "PEFT", "peft_version": "0.18", "base_model": "someone/toy"},)


def test_bfloat16_rows_are_read(tmp_path: Path) -> None:
    halves = (VALUES.view(np.uint32) >> 16).astype("<u2")
    folder = foreign(tmp_path / "a", halves)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(as_bfloat16(path))
    assert np.array_equal(imported(folder, task=TASK).rows, (halves.astype(np.uint32) << 16).view(np.float32))


def as_bfloat16(path: Path) -> bytes:
    """Relabel a file's uint16 tensors as bfloat16."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + n].replace(b'"U16"', b'"BF16"')
    return len(header).to_bytes(8, "little") + header + content[8 + n :]


def test_a_foreign_adapter_is_placed_before_bos_as_in_peft(tmp_path: Path) -> None:
    prompt = imported(foreign(tmp_path / "a", VALUES), task=TASK)
    assert prompt.spec.placement == "first"
    scorer, held_out = Llama(), rows(8)
    texts = [scorer.tokenize(f"{text}\nMood:") for text, _ in held_out]
    assert all(text[0] == BOS for text in texts)
    logits = scorer.score_with_soft_prompt(texts, VALUES, [ord("b"), ord("g")])[0]
    assert np.array_equal(evaluate(scorer, TASK, held_out, prompt).predictions, logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("spoil", "value"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "LORA"),
        (
            lambda folder: (folder / "adapter_config.json").write_text(
                '{"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS"}'
            ),
            "SEQ_CLS",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "adapter_model.safetensors",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 40), "prompt_embeddings"),
        (lambda folder: retrain(folder, lambda values: values * np.nan), "prompt_embeddings"),
        (lambda folder: retrain(folder, lambda values: values[:, :5]), " 5 "),
        (lambda folder: retrain(folder, lambda values: values[0]), "prompt_embeddings"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(tmp_path: Path, spoil: Any, value: str) -> None:
    folder = foreign(tmp_path / "a", VALUES)
    spoil(folder)
    with raises(PromptError) as caught:
        imported(folder, task=TASK)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "value"),
    [
        ({"task": TASK}, ConfigError, str(list(TASK.labels))),
        ({"scorer": Llama(seed=1, name="other")}, PromptError, "other"),
        ({"scorer": ToyScorer()}, PromptError, "toy"),
    ],
)
def test_an_exported_adapter_is_for_its_own_model_and_task(
    tmp_path: Path, changes: dict[str, Any], error: type[FedbptError], value: str
) -> None:
    with raises(error) as caught:
        imported(exported(tmp_path, make()), **changes)
    assert value in str(caught.value)


def test_a_missing_template_is_refused(tmp_path: Path) -> None:
    with raises(ConfigError, field="template", limit=1):
        imported(foreign(tmp_path / "a", VALUES), task=TASK, template=2)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with raises(PromptError) as caught:
        imported(tmp_path / "none")
    assert str(tmp_path / "none") in str(caught.value)


@pytest.mark.parametrize("to", ["npy", "gguf"])
def test_what_cannot_be_replaced_keeps_its_card(tmp_path: Path, to: Any) -> None:
    target = tmp_path / "out"
    target.mkdir()
    card_path(target).write_text("of another prompt")
    with raises(PromptError) as caught:
        export_prompt(make(), target, to)
    assert str(target) in str(caught.value)
    assert card_path(target).read_text() == "of another prompt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.md"]
