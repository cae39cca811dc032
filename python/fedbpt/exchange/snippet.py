"""Python code for the README of an exported adapter, which uses it with transformers and PEFT.

For the same weights, its float32 logits equal those of fedbpt's engine up to rounding.
"""

from __future__ import annotations

import json
import textwrap

from fedbpt.engine.scorer import Scorer
from fedbpt.plain_text import one_line
from fedbpt.prompts.model_card import known_model
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import Template
from fedbpt.tasks.task import SENTINELS, Task, cue_ids, head_ids, label_word_ids, split_pattern

_SETUP = """\
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = "."  # the folder of this file
MODEL = {model}  # {weights}
LABELS = {labels}
TEMPLATES = [  # token ids before the text, sentinels, white space before the text, ids of the cue, of each label word
{templates}]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), FOLDER).eval()
plain = model.get_base_model()
parts = load_file(f"{{FOLDER}}/prompt.safetensors")  # label bias and readout
"""

_TOKENS = """\

def tokens(text, sentinels, gap):
    \"\"\"Token ids of a text as a continuation of the text before it, which a sentinel stands for.\"\"\"
    text = gap + " ".join(text.split()[:{max_words}])
    for sentinel in sentinels or [""]:
        before, joined = (
            tokenizer(part, add_special_tokens=False).input_ids for part in (sentinel, sentinel + text)
        )
        if joined[: len(before)] == before:
            return joined[len(before) :][:{max_tokens}]
    raise ValueError(f"cannot tokenise {{text!r}}")
"""

_IN_CUE = """\

def logits(ids, more, tuned):
    \"\"\"Logits [1 + len(more), n_vocab] after ids and after each of more.\"\"\"
    embeds = plain.get_input_embeddings()(torch.tensor([ids + more]))
    if tuned:  # the prompt replaces the cue's last tokens, whereas PEFT would put it first
        rows = model.get_prompt(batch_size=1)[0]
        embeds[0, len(ids) - len(rows) : len(ids)] = rows
    return plain(inputs_embeds=embeds).logits[0, -1 - len(more) :]
"""

_IN_FRONT = """\

def logits(ids, more, tuned):
    \"\"\"Logits [1 + len(more), n_vocab] after ids and after each of more. PEFT puts the prompt first.\"\"\"
    return (model if tuned else plain)(input_ids=torch.tensor([ids + more])).logits[0, -1 - len(more) :]
"""

_AFTER = """\
        after = logits(ids, [], tuned=i == 0)[0]
"""

_OF_TOKENS = """\
        scores = after[[word[0] for word in words]]
"""

_OF_WORDS = """\
        scores = []
        for word in words:  # the log-probability of all its tokens
            log_probs = logits(ids, word[:-1], tuned=i == 0).log_softmax(-1)
            scores.append(log_probs[range(len(word)), word].sum())
        scores = torch.stack(scores)
"""

_LABELS = """\

@torch.no_grad()
def label_logits(text):
    \"\"\"Logits [n_labels], the largest for the most likely label.\"\"\"
    readouts = [torch.cat([parts["label_bias"][None], parts.get("word_weights", torch.zeros(0, len(LABELS)))])]
    readouts += list(parts.get("other_weights", []))
    read_words = parts.get("word_ids", torch.zeros(0)).long()
    found = []
    for i, (before, sentinels, gap, cue, words) in enumerate(TEMPLATES):
        ids = [*before, *tokens(text, sentinels, gap), *cue]
{scores}        found.append(scores + torch.cat([torch.ones(1), after[read_words]]) @ readouts[i])
    return found[0] if len(found) == 1 else torch.stack(found).log_softmax(-1).mean(0)


print(LABELS[label_logits({example}).argmax()])
"""

_STATES = """\

LAYERS = {layers}
states = {{}}  # after each layer, of the last forward pass [1, n_tokens, n_embd]


def keep(layer):
    \"\"\"Keep the layer's output: of the last layer, before the model's final norm.\"\"\"

    def hook(_module, _inputs, output):
        states[layer] = output[0] if isinstance(output, tuple) else output

    plain.model.layers[layer].register_forward_hook(hook)


for layer in LAYERS:
    keep(layer)
"""

_LAYERS = """\

@torch.no_grad()
def label_logits(text):
    \"\"\"Logits [n_labels], the largest for the most likely label.\"\"\"
    found = parts["label_bias"].clone()
    for i, (before, sentinels, gap, cue, words) in enumerate(TEMPLATES):
        ids = [*before, *tokens(text, sentinels, gap), *cue]
        after = logits(ids, [], tuned=i == 0)[0]
        read = torch.stack([states[layer][0, -1] for layer in LAYERS])
        read = read / read.square().mean(-1, keepdim=True).sqrt()
        found += torch.einsum("le,lek->k", read, parts["layer_weights"][i].float())
{scores}    return found


print(LABELS[label_logits({example}).argmax()])
"""

_SCALED = """\
        if words:  # the log-probabilities of the label words count too
{scores}            found += parts["word_scales"][i] * scores.log_softmax(-1)
"""

_TEXT = """\

@torch.no_grad()
def next_logits(text):
    \"\"\"Logits [n_vocab] of the token after the text and the cue.\"\"\"
    before, sentinels, gap, cue, _ = TEMPLATES[0]
    return logits([*before, *tokens(text, sentinels, gap), *cue], [], tuned=True)[0]


print(tokenizer.decode(next_logits({example}).argmax()))
"""


def snippet(prompt: Prompt, scorer: Scorer, task: Task, model: str, n_bos: int) -> str:
    """Generate the code, which runs in the adapter's folder.

    Args:
        prompt: the adapter's prompt.
        scorer: its model, for token ids.
        task: its task, which limits the length of texts.
        model: name or folder from which transformers loads the weights.
        n_bos: number of the adapter's virtual tokens for BOS.
    """
    known = known_model(prompt.model_name, prompt.model_fingerprint)
    quantised = known is not None and known.original == model
    words = _words(prompt, scorer)
    templates = _templates(prompt)
    lines = [_line(scorer, template, words[i], n_bos if i == 0 else 0) for i, template in enumerate(templates)]
    name = one_line(prompt.model_name)  # goes into a comment
    setup = _SETUP.format(
        model=json.dumps(model),
        weights="not quantised: logits differ a little" if quantised else f"the weights of {name}",
        labels=list(prompt.labels),
        templates="".join(lines),
    )
    logits = _IN_CUE if prompt.spec.placement == "cue" else _IN_FRONT
    tokens = _TOKENS.format(max_words=task.max_words or "", max_tokens=task.max_text_tokens)
    readout = prompt.layer_readout
    states = [] if readout is None else [_STATES.format(layers=list(readout.layers))]
    return "\n".join([setup, tokens, *states, logits, _result(prompt, words)])


def _templates(prompt: Prompt) -> tuple[Template, ...]:
    """All templates that are read, the prompt's own first."""
    return (prompt.template, *(prompt.others if prompt.layer_readout is None else prompt.layer_readout.others))


def _words(prompt: Prompt, scorer: Scorer) -> list[list[list[int]]]:
    """Token ids of the label words of each template; none where they do not count."""
    readout = prompt.layer_readout
    counts = [True] * len(_templates(prompt)) if readout is None else readout.word_scales.numpy().astype(bool).tolist()
    return [
        [word.tolist() for word in label_word_ids(scorer, template, prompt.labels)] if counted else []
        for template, counted in zip(_templates(prompt), counts, strict=True)
    ]


def _line(scorer: Scorer, template: Template, words: list[list[int]], n_skipped: int) -> str:
    """An entry of TEMPLATES, without the first ``n_skipped`` token ids."""
    head = split_pattern(template)[0]
    stripped_head = head.rstrip()
    before = head_ids(scorer, template).tolist()[n_skipped:]
    sentinels = "".join(SENTINELS) if stripped_head else ""
    gap = head[len(stripped_head) :] if stripped_head else head
    cue = cue_ids(scorer, template).tolist()
    return f"    ({before}, {json.dumps(sentinels)}, {json.dumps(gap)}, {cue}, {words}),\n"


def _result(prompt: Prompt, words: list[list[list[int]]]) -> str:
    example = json.dumps("A text")
    if not prompt.labels:
        return _TEXT.format(example=example)
    scored = [word for of_template in words for word in of_template]
    scores = _OF_TOKENS if all(len(word) == 1 for word in scored) else _OF_WORDS
    if prompt.layer_readout is None:
        return _LABELS.format(scores=_AFTER + scores, example=example)
    counted = _SCALED.format(scores=textwrap.indent(scores, "    ")) if scored else ""
    return _LAYERS.format(scores=counted, example=example)
