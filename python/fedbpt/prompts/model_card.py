"""The model card of a prompt: Markdown with the front matter of the Hugging Face hub. Unknown facts are omitted."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from fedbpt.models import CATALOGUE, CatalogueEntry, PackagedFile
from fedbpt.plain_text import one_line, plain
from fedbpt.prompts.variants import UNSCORED, VARIANTS
from fedbpt.protocol.specs import LayerReadout, PromptSpec, Template
from fedbpt.tasks import Task

_MARKUP = re.compile(r"[\\`*_{}\[\]<>&~$@#]|:(?=//)|(?<=\bwww)\.|^[-+=]", re.IGNORECASE)

PLACES = {
    "cue": "in place of the answer cue's last {n} token(s)",
    "front": "before the text, after BOS where the model has one",
    "first": "before everything, BOS included",
    "layer": "by addition to the output of one layer at the answer cue's last token",
    "layers": "by addition to each layer's output at the answer cue's last token and every later one",
}
"""Descriptions of where the rows go, by placement."""

_TRAINING = {
    "run": "run",
    "method": "method",
    "rounds": "rounds",
    "evaluations": "evaluations",
    "devices": "devices",
    "tokens": "forward tokens",
    "seed": "seed",
    "robust": "robust aggregation",
    "byzantine": "Byzantine devices tolerated",
    "clip": "privacy: clip, nats",
    "noise_multiplier": "privacy: noise multiplier",
    "readout_noise": "privacy: noise multiplier of the readout",
    "delta": "privacy: δ",
    "epsilon": "privacy: ε per training row of a device",
    "digest": "digest of the search",
    "imported_from": "imported from",
    "peft_version": "PEFT version",
    "base_model": "base model, according to the adapter",
}


FACTORS_AFTER_EMBEDDING = {
    "afmoe": "√n_embd if its configuration sets mup_enabled",
    "granite": "its embedding_multiplier",
    "granite_swa": "its embedding_multiplier",
    "granitemoe": "its embedding_multiplier",
    "hrm_text": "its embedding_scale",
}
"""Architectures whose ``inputs_embeds`` transformers (5.x) multiplies by a factor, and the factor."""


_ROWS = {
    "test": "On held-out test rows, which were not used in tuning.",
    "dev": "On development rows, which were used to monitor tuning. No test rows were held out.",
}


_WITHOUT_PROMPT = ("zero_shot", "calibrated", "probe")
"""Variants without a prompt (`fedbpt.prompts.variants.VARIANTS`)."""

_NO_PROMPT = (
    "The latent is z = 0: the rows are those of the cue's own tokens, so the model is used without a prompt. What was "
    "tuned is how labels are read from it.\n"
)

_NOT_BETTER = (
    "The latent is z = 0: the rows are those of the cue's own tokens, so the model is used without a prompt. What was "
    "tuned was not shown to be better on held-out training rows.\n"
)


class Described(Protocol):
    """The attributes of a `fedbpt.prompts.prompt.Prompt` that its card describes."""

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
    layer_readout: LayerReadout | None

    @property
    def n_prompt(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_words(self) -> int: ...


def known_model(name: str, fingerprint: str) -> CatalogueEntry | None:
    """The catalogue's entry for a model file; None if there is none or the file differs from it."""
    entry = CATALOGUE.get(name)
    if entry is None or not isinstance(entry.source, PackagedFile):
        return entry
    return entry if fingerprint == f"sha256:{entry.source.sha256}" else None


def scale_notes(architecture: str) -> tuple[str, ...]:
    """One line on how rows differ from what transformers takes as ``inputs_embeds``; empty if they do not."""
    factor = FACTORS_AFTER_EMBEDDING.get(architecture)
    if factor is None:
        return ()
    return (
        "Rows are the first layer's input. Transformers multiplies the inputs_embeds of "
        f"{architecture} by {factor}: divide the rows by it before passing them as inputs_embeds.",
    )


def model_card(prompt: Described, use: str, library: str = "fedbpt") -> str:
    """Write the card of a prompt, as Markdown.

    Args:
        prompt: the prompt.
        use: Markdown that says how to load it.
        library: the ``library_name`` for the hub.
    """
    known = known_model(prompt.model_name, prompt.model_fingerprint)
    last = prompt.history[-1] if prompt.history else {}
    kind = "a readout" if _is_without_prompt(prompt) and prompt.labels else "a soft prompt"
    parts = [
        _front_matter(prompt, known, library),
        f"# {as_markdown(prompt.task_name)}: {kind} for {as_markdown(prompt.model_name)}\n",
        f"{prompt.n_prompt} row(s) of {prompt.n_embd} numbers that adapt a frozen language model to a task, inserted "
        f"{PLACES[prompt.spec.placement].format(n=prompt.n_prompt)}. Made with fedbpt.\n",
        *([_NO_PROMPT if prompt.labels else _NOT_BETTER] if _is_without_prompt(prompt) else []),
        "## Model\n\n" + _model(prompt, known),
        "## Task\n\n" + _task(prompt),
    ]
    training = [(title, _figure(last[key])) for key, title in _TRAINING.items() if last.get(key) is not None]
    if training:
        parts.append("## Training\n\n" + _table(("", ""), training))
    results = _results(last)
    if results:
        parts.append(f"## Results\n\n{_ROWS.get(str(last.get('split')), _ROWS['test'])}\n\n{results}{_lines(last)}")
    parts += ["## Licence\n\n" + _licence(known), "## Use\n\n" + use]
    return "\n".join(parts)


def use_in_fedbpt(prompt: Described, file_name: str) -> str:
    """How to load a prompt file, as Markdown. Models of the catalogue are referred to by name, others by file."""
    known = prompt.model_name in CATALOGUE
    model = prompt.model_name if known else f"{prompt.model_name}.gguf"
    options = "" if known else f" --model {shlex.quote(one_line(model))}"
    task = "prompt.task"
    if prompt.task is None:
        options = f"{options} --task task.toml"
        task = 'fedbpt.tasks.load("task.toml")'
    file = shlex.quote(one_line(file_name))
    command = f"$ fedbpt evaluate {file}{options} --data rows.csv\n$ fedbpt chat --prompt {file}{options}\n"
    code = (
        "import fedbpt\n\n"
        f"scorer = fedbpt.load_model({json.dumps(model)})\n"
        f"prompt = fedbpt.Prompt.load({json.dumps(file_name)})\n"
        f'fedbpt.evaluate(scorer, {task}, "rows.csv", prompt=prompt)\n'
    )
    return f"{fenced(command, 'console')}\n{fenced(code, 'python')}"


def as_markdown(text: str) -> str:
    """Escape ``text`` as one line of Markdown that renders literally: no markup, link or HTML."""
    escaped = _MARKUP.sub(r"\\\g<0>", one_line(text))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped)  # would begin a list


def fenced(code: str, language: str = "") -> str:
    """Make a code block whose fence does not occur in ``code``, which must end with a line feed."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{plain(code)}{fence}\n"


def _front_matter(prompt: Described, known: CatalogueEntry | None, library: str) -> str:
    """YAML front matter; values are written as JSON, a subset of YAML."""
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
    notes = "".join(f"\n{note}\n" for note in scale_notes(prompt.architecture))
    fits = "\nThe prompt fits only this file, not the same model in another weight format.\n"
    return _table(("", ""), lines) + fits + notes


def _task(prompt: Described) -> str:
    text = f"{_span(prompt.task_name)}. "
    if prompt.layer_readout is not None:
        text += _layers(prompt, prompt.layer_readout)
    else:
        text += _word_by_word(prompt)
    if prompt.task is not None:
        text += f"\n{_data_format(prompt.task)}\n"
    if prompt.n_words:
        text += (
            f"\nA readout, fitted to training rows, corrects label scores by the logits of {prompt.n_words} words.\n"
        )
    if prompt.others:
        text += "\nThe labels' log-probabilities are averaged with those of the model without the prompt, for\n\n"
        text += "\n".join(map(_pattern, prompt.others))
    return text


def _word_by_word(prompt: Described) -> str:
    """How labels are read from the next word, or a text is continued, as Markdown."""
    text = f"A text is presented to the model as\n\n{_pattern(prompt.template)}\n"
    if not prompt.labels:
        return f"{text}The output is the model's continuation.\n"
    words = [(as_markdown(label), _span(json.dumps(word, ensure_ascii=False))) for label, word in _words(prompt)]
    text += "The predicted label is the one whose word is the likeliest continuation.\n\n"
    return text + _table(("label", "word"), words)


def _layers(prompt: Described, readout: LayerReadout) -> str:
    """How labels are read from hidden states, as Markdown."""
    layers = ", ".join(map(str, readout.layers))
    parts = [
        f"Labels are read, by weights fitted to training rows, from the model's hidden states after layers {layers} "
        "(counted from 0) at the last token of the texts below.\n"
    ]
    for place in readout.places_read:
        with_prompt = place == 0 and not _is_without_prompt(prompt)
        template = prompt.template if place == 0 else readout.others[place - 1]
        parts.append(f"{'With' if with_prompt else 'Without'} the prompt:\n\n{_pattern(template)}")
    n_scored = sum(bool(scale) for scale in readout.word_scales.numpy())
    if not n_scored:
        labels = ", ".join(map(as_markdown, prompt.labels))
        return "\n".join([*parts, f"Label words do not count. The labels: {labels}.\n"])
    words = [(as_markdown(label), _span(json.dumps(word, ensure_ascii=False))) for label, word in _words(prompt)]
    parts.append(f"The log-probabilities of the label words count too, in {n_scored} of these texts.\n")
    return "\n".join([*parts, _table(("label", "word"), words)])


def _is_without_prompt(prompt: Described) -> bool:
    """Whether the run shipped z = 0."""
    return bool(prompt.history) and prompt.history[-1].get("shipped") in _WITHOUT_PROMPT


def _lines(entry: Mapping[str, Any]) -> str:
    """Which of the lines of the results the file holds, and why zero-shot may be missing; empty if unknown."""
    held = VARIANTS.get(str(entry.get("shipped")))
    if held is None:
        return ""
    if _is_number(entry.get("probe_accuracy")) and "zero_shot_accuracy" not in entry:
        return f'\nThis file holds the line "{held}". {UNSCORED[0].upper()}{UNSCORED[1:]}.\n'
    if "readout_noise" in entry:
        return f'\nThis file holds the line "{held}", which is made from noisy sums of training rows.\n'
    return f'\nThis file holds the line "{held}", which held-out training rows chose.\n'


def _data_format(task: Task) -> str:
    words = "" if task.max_words is None else f"{task.max_words} words and "
    columns = " or ".join(f"`{column}`" for column in task.text_columns)
    return (
        f"Texts are cut to {words}{task.max_text_tokens} tokens. "
        f"Data files have the text in column {columns} and the {'label' if task.labels else 'target text'} in "
        f"`{task.label_column}`."
    )


def _words(prompt: Described) -> Iterable[tuple[str, str]]:
    return zip(prompt.labels, prompt.template.label_words, strict=True)


def _results(entry: Mapping[str, Any]) -> str:
    """Tables of the results in a history entry; empty if it has none."""
    figure = "accuracy" if "tuned_accuracy" in entry else "perplexity"
    tables = [_results_table(entry, figure, figure, "n")]
    if isinstance(entry.get("metric"), str):
        tables.append(_results_table(entry, "reward", f"{as_markdown(entry['metric'])} of its answers", "answers"))
    return "\n".join(filter(None, tables))


def _results_table(entry: Mapping[str, Any], figure: str, heading: str, n: str) -> str:
    """``n``: key of the number of rows."""
    lines = []
    for key, title in VARIANTS.items():
        value = entry.get(f"{key}_{figure}")
        if _is_number(value):
            low_high = entry.get(f"{key}_interval")
            known = isinstance(low_high, list | tuple) and len(low_high) == 2 and all(map(_is_number, low_high))
            interval = f"{low_high[0]:.3f} – {low_high[1]:.3f}" if known and low_high and figure == "accuracy" else ""
            lines.append((title, f"{value:.3f}", interval, _figure(entry.get(f"{key}_{n}", ""))))
    return _table(("", heading, "95 % interval", "rows"), lines) if lines else ""


def _licence(known: CatalogueEntry | None) -> str:
    text = "A prompt is derived from training rows and works only with its model: the terms of both apply.\n"
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
    """Format ``text`` as inline code, or as escaped text if it holds characters that code cannot escape."""
    line = one_line(text)
    return as_markdown(line) if "`" in line or "\\" in line else f"`{line}`"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table of cells that are Markdown already."""
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
