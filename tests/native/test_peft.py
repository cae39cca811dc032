"""Adapters in Hugging Face PEFT, on tiny models: exported ones give fedbpt's label logits, imported ones PEFT's."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_case import Case

from fedbpt import Prompt, PromptSpec, export_prompt, import_prompt
from fedbpt.engine.scorer import Scorer
from fedbpt.objective.layer_view import LayerReader
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import blocks, ensemble
from fedbpt.protocol.specs import Array, LayerReadout, ObjectiveSpec, PromptPlace, Template
from fedbpt.tasks import Task, label_word_ids, render_ids

if any(find_spec(name) is None for name in ("peft", "torch", "transformers")):
    pytest.skip(
        "comparing with PEFT needs peft, torch and transformers: pip install '.[peft]'", allow_module_level=True
    )

# PEFT uses functions that transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOLERANCE = 2e-3  # max |Δlogit| on float32 weights; the logits themselves spread over ten units
TASK = Task(
    name="mood",
    labels=("good", "bad"),
    templates=(
        Template(pattern="{text}\nMood:", label_words=(" good", " bad")),
        Template(pattern="The news: {text}\nIt was", label_words=(" great", " terrible")),
        Template(pattern="{text} (is it", label_words=(" good", " terribly")),  # of several tokens
    ),
    max_text_tokens=12,
)
TEXTS = [
    "the movie was great",
    "bad stock market news of the world: 12 teams, no game!",
    "a film is a text is a film is a text is a film is a text is a film",
]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Make a transformers folder of a tiny model, with weights and tokenizer."""
    made: dict[Path, Path] = {}

    def convert(case: Case) -> Path:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)  # on a busy machine, synchronising threads slows tiny models down a hundredfold
        if case.path not in made:
            folder = tmp_path_factory.mktemp("hugging-face")
            source = {"pretrained_model_name_or_path": case.path.parent, "gguf_file": case.path.name}
            read = AutoModelForCausalLM.from_pretrained(**source)
            del read.config.quantization_config  # the weights have been dequantised to float32
            # of Gemma 3; GGUF does not hold it, and the larger models' head_dim is taken for it
            read.config.query_pre_attn_scalar = case.model.head_dim
            model = AutoModelForCausalLM.from_config(read.config)
            model.load_state_dict(read.state_dict())
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
            made[case.path] = folder
        return made[case.path]

    return convert


def prompt_of(case: Case, placement: PromptPlace, n_prompt: int, template: int, whole: bool) -> Prompt:
    """A random prompt; ``whole``: with readout, and with the other templates."""
    rng = np.random.default_rng(7)
    others = tuple(t for i, t in enumerate(TASK.templates) if i != template) if whole else ()
    words = rng.integers(3, case.model.n_vocab, 5) if whole else None
    return Prompt(
        rows=case.prompts(1, n_prompt)[0],
        spec=PromptSpec(placement=placement, n_prompt=n_prompt, d=1),
        task_name=TASK.name,
        labels=TASK.labels,
        template=TASK.templates[template],
        model_fingerprint=case.scorer.fingerprint,
        model_name=case.scorer.name,
        architecture=case.scorer.architecture,
        label_bias=np.array([0.5, -0.5]),
        word_ids=words,
        word_weights=rng.normal(0, 0.3, (5, 2)) if whole else None,
        others=others,
        other_weights=rng.normal(0, 0.3, (len(others), 6, 2)) if whole else None,
    )


def label_logits(scorer: Scorer, prompt: Prompt, text: str) -> NDArray[np.float64]:
    """fedbpt's label logits of a text [n_labels], with readout and other templates."""
    spec = ObjectiveSpec(max_text_tokens=TASK.max_text_tokens, readout_words=0)
    found = []
    for i, template in enumerate((prompt.template, *prompt.others)):
        place = msgspec.structs.replace(prompt.spec, d=1)
        objective = Objective(
            scorer, template, TASK.labels, [(text, 0)], spec, place, keep_kv=False, words=prompt.word_ids
        )
        found.append(objective.logits(prompt.rows[None] if i == 0 else objective.zero_shot_embeds(), [0]))
    return ensemble(found, blocks(prompt.readout, prompt.n_words, len(TASK.labels)))[0]


def code_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the README's code in its folder, and return what it defines."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "readout"])
@pytest.mark.parametrize(
    ("placement", "n_prompt", "template"), [("cue", 2, 0), ("cue", 1, 2), ("front", 3, 1), ("first", 2, 0)]
)
def test_the_code_beside_an_adapter_gives_the_same_label_logits(
    case: Case,
    hugging_face: Callable[[Case], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placement: PromptPlace,
    n_prompt: int,
    template: int,
    whole: bool,
) -> None:
    prompt = prompt_of(case, placement, n_prompt, template, whole)
    base = str(hugging_face(case))
    export_prompt(prompt, tmp_path / "a", "peft", scorer=case.scorer, task=TASK, base_model=base)
    names = code_of(tmp_path / "a", monkeypatch)
    without = prompt.with_rows(prompt.rows * 0, ())
    for text in TEXTS:
        expected = label_logits(case.scorer, prompt, text)
        assert np.abs(names["label_logits"](text).numpy() - expected).max() <= TOLERANCE
        assert np.abs(label_logits(case.scorer, without, text) - expected).max() > 5 * TOLERANCE


def layered(case: Case, placement: PromptPlace, n_prompt: int, template: int, scales: tuple[float, ...]) -> Prompt:
    """A random prompt that reads three layers, the last one too, under all templates, its own first."""
    rng = np.random.default_rng(11)
    plain = prompt_of(case, placement, n_prompt, template, whole=False)
    layers = tuple(sorted({0, case.scorer.n_layer // 2, case.scorer.n_layer - 1}))
    weights = rng.normal(0, 0.3, (len(TASK.templates), len(layers), case.model.n_embd, len(TASK.labels)))
    readout = LayerReadout(
        layers=layers,
        weights=Array.of(weights, "<f2"),
        word_scales=Array.of(np.array(scales), "<f4"),
        bias=Array.of(np.array([0.25, -0.5]), "<f4"),
        others=tuple(each for i, each in enumerate(TASK.templates) if i != template),
    )
    fields = ("spec", "task_name", "labels", "template", "model_fingerprint", "model_name", "architecture")
    return Prompt(rows=plain.rows, layer_readout=readout, **{name: getattr(plain, name) for name in fields})


@pytest.mark.parametrize(
    ("placement", "n_prompt", "template", "scales"),
    [
        ("cue", 2, 0, (0.5, 0.0, 0.25)),
        ("cue", 1, 2, (0.0, 0.0, 0.0)),
        ("front", 3, 1, (0.0, 0.5, 0.0)),
        ("first", 2, 0, (1.0, 0.0, 0.0)),
    ],
)
def test_the_code_beside_an_adapter_reads_the_same_label_logits_from_layers(
    case: Case,
    hugging_face: Callable[[Case], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placement: PromptPlace,
    n_prompt: int,
    template: int,
    scales: tuple[float, ...],
) -> None:
    prompt = layered(case, placement, n_prompt, template, scales)
    base = str(hugging_face(case))
    export_prompt(prompt, tmp_path / "a", "peft", scorer=case.scorer, task=TASK, base_model=base)
    assert import_prompt(tmp_path / "a", case.scorer) == prompt
    names = code_of(tmp_path / "a", monkeypatch)

    def read(of: Prompt, text: str) -> NDArray[np.float64]:
        assert of.layer_readout is not None
        rows = (of.rows, of.spec)
        limit = TASK.max_text_tokens
        return LayerReader(of.layer_readout, case.scorer, of.template, of.labels, limit, *rows).logits([text])[0]

    without = prompt.with_rows(prompt.rows * 0, ())
    for text in TEXTS:
        expected = read(prompt, text)
        assert np.abs(names["label_logits"](text).numpy() - expected).max() <= TOLERANCE
        assert np.abs(read(without, text) - expected).max() > 5 * TOLERANCE


def test_the_code_beside_an_adapter_for_target_texts_gives_the_same_next_logits(
    llama: Case, hugging_face: Callable[[Case], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Template(pattern="Question: {text}\nAnswer:", label_words=())
    task = Task(name="chat", templates=(template,))
    prompt = Prompt(
        rows=llama.prompts(1, 2)[0],
        spec=PromptSpec(n_prompt=2, d=1),
        task_name="chat",
        labels=(),
        template=template,
        model_fingerprint=llama.scorer.fingerprint,
        model_name="tiny",
        architecture="llama",
    )
    base = str(hugging_face(llama))
    export_prompt(prompt, tmp_path / "a", "peft", scorer=llama.scorer, task=task, base_model=base)
    found = code_of(tmp_path / "a", monkeypatch)["next_logits"](TEXTS[0]).numpy()
    text = render_ids(llama.scorer, template, TEXTS[0])
    assert np.abs(found - llama.reference.score([text], prompt.rows, placement="cue")[0, 0]).max() <= TOLERANCE


def test_an_adapter_that_peft_made_gives_pefts_label_logits(
    case: Case, hugging_face: Callable[[Case], Path], tmp_path: Path
) -> None:
    import torch
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hugging_face(case))
    torch.manual_seed(0)
    tuned = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()
    tuned.save_pretrained(tmp_path)
    prompt = import_prompt(tmp_path, case.scorer, TASK)
    (made,) = tuned.prompt_encoder.values()
    assert prompt.rows.tobytes() == made.embedding.weight.detach().numpy().tobytes()
    words = [int(word[0]) for word in label_word_ids(case.scorer, prompt.template, TASK.labels)]
    for text in TEXTS:
        ids = render_ids(case.scorer, prompt.template, text, TASK.max_text_tokens)
        with torch.no_grad():
            expected = tuned(input_ids=torch.tensor(ids[None], dtype=torch.long)).logits[0, -1, words].numpy()
        assert np.abs(label_logits(case.scorer, prompt, text) - expected).max() <= TOLERANCE
