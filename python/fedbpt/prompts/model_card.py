"""The model card of a prompt: Markdown with the front matter of the Hugging Face hub. What is not known is left out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from fedbpt.models import CATALOGUE, CatalogueEntry, PackagedFile
from fedbpt.plain_text import one_line, plain
from fedbpt.protocol.specs import PromptSpec, Template
from fedbpt.tasks import Task

_MARKUP = re.compile(r"[\\`*_{}\[\]<>&~$@#]|:(?=//)|(?<=\bwww)\.|^[-+=]", re.IGNORECASE)

PLACES = {
    "cue": "in place of the answer cue's last {n} token(s)",
    "front": "before the text, after BOS where the model has one",
    "first": "before everything, BOS included",
}
"""Where a prompt stands, by placement."""

_TRAINING = {
    "run": "run",
    "method": "method",
    "rounds": "rounds",
    "evaluations": "evaluations",
    "devices": "devices",
    "tokens": "forward tokens",
    "seed": "seed",
    "robust": "robust aggregation",
    "byzantine": "devices that may lie",
    "clip": "privacy: clip, nats",
    "noise_multiplier": "privacy: noise multiplier",
    "delta": "privacy: δ",
    "epsilon": "privacy: ε, of one training row of a device",
    "digest": "digest of the search",
    "imported_from": "imported from",
    "peft_version": "PEFT version",
    "base_model": "base model, as the adapter says",
}


FACTORS_AFTER_EMBEDDING = {
    "afmoe": "√n_embd where its configuration says mup_enabled",
    "granite": "its embedding_multiplier",
    "granite_swa": "its embedding_multiplier",
    "granitemoe": "its embedding_multiplier",
    "hrm_text": "its embedding_scale",
}
"""Architectures whose embeddings transformers (5.x) multiplies after ``inputs_embeds``, not before, and by what."""


_STAGES = {
    "zero_shot": "zero-shot",
    "calibrated": "calibration only",
    "probe": "linear probe",
    "prompt": "tuned, without readout",
    "tuned": "tuned",
}

_ROWS = {
    "test": "On held-back rows, which chose nothing.",
    "dev": "On development rows, which showed how the tuning went. No others were held back.",
}


class Described(Protocol):
    """What the card asks of a prompt; a `fedbpt.prompts.prompt.Prompt` satisfies it."""

    spec: PromptSpec
    task_name: str
    labels: tuple[str, ...]
    template: Template
    others: tuple[Template, ...]
    model_fingerprint: str
    model_name: str
    architecture: str
    history: tuple[dict[str, Any], ...]
    task: Task | None

    @property
    def n_prompt(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_words(self) -> int: ...


def known_model(name: str, fingerprint: str) -> CatalogueEntry | None:
    """The catalogue's entry of a model file; None where it is another, or nobody can tell."""
    entry = CATALOGUE.get(name)
    if entry is None or not isinstance(entry.source, PackagedFile):
        return entry
    return entry if fingerprint == f"sha256:{entry.source.sha256}" else None


def scale_notes(architecture: str) -> tuple[str, ...]:
    """Where rows are not what transformers takes as ``inputs_embeds``: how they differ, one line; else none."""
    factor = FACTORS_AFTER_EMBEDDING.get(architecture)
    if factor is None:
        return ()
    return (
        "Rows are what the first layer reads. Transformers multiplies the inputs_embeds of "
        f"{architecture} by {factor}: divide rows by it to pass them there.",
    )


def model_card(prompt: Described, use: str, library: str = "fedbpt") -> str:
    """The card of a prompt, Markdown.

    Args:
        prompt: whose card.
        use: Markdown on how to load it.
        library: for the hub, what loads it.
    """
    known = known_model(prompt.model_name, prompt.model_fingerprint)
    parts = [
        _front_matter(prompt, known, library),
        f"# {as_markdown(prompt.task_name)}: a soft prompt for {as_markdown(prompt.model_name)}\n",
        f"{prompt.n_prompt} row(s) of {prompt.n_embd} numbers that adapt a frozen language model to a task, "
        f"{PLACES[prompt.spec.placement].format(n=prompt.n_prompt)}. Made with fedbpt.\n",
        "## Model\n\n" + _model(prompt, known),
        "## Task\n\n" + _task(prompt),
    ]
    told = prompt.history[-1] if prompt.history else {}
    training = [(title, _figure(told[key])) for key, title in _TRAINING.items() if told.get(key) is not None]
    if training:
        parts.append("## Training\n\n" + _table(("", ""), training))
    results = _results(told)
    if results:
        parts.append(f"## Results\n\n{_ROWS.get(str(told.get('split')), _ROWS['test'])}\n\n{results}")
    parts += ["## Licence\n\n" + _licence(known), "## Use\n\n" + use]
    return "\n".join(parts)


def use_in_fedbpt(prompt: Described, file_name: str) -> str:
    """How a prompt file is loaded, as Markdown. The model goes by name where fedbpt knows it."""
    known = prompt.model_name in CATALOGUE
    model = prompt.model_name if known else f"{prompt.model_name}.gguf"
    given = "" if known else f" --model {shlex.quote(one_line(model))}"
    task = "prompt.task"
    if prompt.task is None:
        given, task = f"{given} --task task.toml", 'fedbpt.tasks.load("task.toml")'
    file = shlex.quote(one_line(file_name))
    command = f"$ fedbpt evaluate {file}{given} --data rows.csv\n$ fedbpt chat --prompt {file}{given}\n"
    code = (
        "import fedbpt\n\n"
        f"scorer = fedbpt.load_model({json.dumps(model)})\n"
        f"prompt = fedbpt.Prompt.load({json.dumps(file_name)})\n"
        f'fedbpt.evaluate(scorer, {task}, "rows.csv", prompt=prompt)\n'
    )
    return f"{fenced(command, 'console')}\n{fenced(code, 'python')}"


def as_markdown(text: str) -> str:
    """Markdown that shows ``text``, on one line: nothing in it is markup, a link or HTML."""
    escaped = _MARKUP.sub(r"\\\g<0>", one_line(text))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped)  # no item of a list


def fenced(code: str, language: str = "") -> str:
    """A block of code, which ends where its fence does and no sooner. ``code`` ends with a line feed."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{plain(code)}{fence}\n"


def _front_matter(prompt: Described, known: CatalogueEntry | None, library: str) -> str:
    """YAML; its strings are JSON's, which are YAML's too."""
    fields: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-classification" if prompt.labels else "text-generation",
        "tags": ["soft-prompt", "prompt-tuning", "black-box-optimisation", "fedbpt"],
    }
    if known is not None and known.original is not None:
        fields["base_model"] = known.original
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---\n"])


def _model(prompt: Described, known: CatalogueEntry | None) -> str:
    lines = [("name", as_markdown(prompt.model_name))]
    if known is not None:
        lines.append(("model", known.description))
    lines += [("architecture", as_markdown(prompt.architecture)), ("file", _span(prompt.model_fingerprint))]
    told = "".join(f"\n{note}\n" for note in scale_notes(prompt.architecture))
    fits = "\nThe prompt fits this very file: other weights differ, in another format, too.\n"
    return _table(("", ""), lines) + fits + told


def _task(prompt: Described) -> str:
    text = f"{_span(prompt.task_name)}. A text is put to the model as\n\n{_pattern(prompt.template)}\n"
    if prompt.labels:
        words = [(as_markdown(label), _span(json.dumps(word, ensure_ascii=False))) for label, word in _words(prompt)]
        text += "and is given the label whose word the model finds likeliest after it.\n\n"
        text += _table(("label", "word"), words)
    else:
        text += "and the text that follows is the model's.\n"
    if prompt.task is not None:
        text += f"\n{_cut(prompt.task)}\n"
    if prompt.n_words:
        text += f"\nA readout, fitted to training rows, corrects scores by the logits of {prompt.n_words} words.\n"
    if prompt.others:
        text += "\nThe labels' log-probabilities are averaged with those of the model without the prompt, asked as\n\n"
        text += "\n".join(map(_pattern, prompt.others))
    return text


def _cut(task: Task) -> str:
    words = "" if task.max_words is None else f"its first {task.max_words} words, "
    columns = " or ".join(f"`{column}`" for column in task.text_columns)
    return (
        f"Of a text {words}at most {task.max_text_tokens} tokens are read. "
        f"Data files have it in column {columns}, and the {'label' if task.labels else 'target text'} in "
        f"`{task.label_column}`."
    )


def _words(prompt: Described) -> Iterable[tuple[str, str]]:
    return zip(prompt.labels, prompt.template.label_words, strict=True)


def _results(told: Mapping[str, Any]) -> str:
    """A table of what the last entry of a history says; empty where it says nothing."""
    lines = []
    figure = "accuracy" if "tuned_accuracy" in told else "perplexity"
    for key, title in _STAGES.items():
        value = told.get(f"{key}_{figure}")
        if _is_number(value):
            low_high = told.get(f"{key}_interval")
            known = isinstance(low_high, list | tuple) and len(low_high) == 2 and all(map(_is_number, low_high))
            interval = f"{low_high[0]:.3f} – {low_high[1]:.3f}" if known and low_high else ""
            lines.append((title, f"{value:.3f}", interval, _figure(told.get(f"{key}_n", ""))))
    return _table(("", figure, "95 % interval", "rows"), lines) if lines else ""


def _licence(known: CatalogueEntry | None) -> str:
    text = "A prompt is made from training rows and is of use with its model alone: mind the terms of both.\n"
    return text if known is None else f"{text}The model's licence: {known.licence}.\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(value: Any) -> str:
    if not _is_number(value):
        return as_markdown(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _pattern(template: Template) -> str:
    return fenced(f"{template.pattern}\n")


def _span(text: str) -> str:
    """``text`` as code, where that needs no escapes: within code there are none."""
    line = one_line(text)
    return as_markdown(line) if "`" in line or "\\" in line else f"`{line}`"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Of cells in Markdown."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
