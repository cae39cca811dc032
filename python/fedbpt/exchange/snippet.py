"""Python code that uses a prompt with transformers and PEFT, for the README of an exported adapter.

It gives the logits that fedbpt's engine gives, for the same weights, in float32 up to rounding.
"""

from __future__ import annotations

import json

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

FOLDER = "."  # where this file is
MODEL = {model}  # {weights}
LABELS = {labels}
TEMPLATES = [  # token ids of what stands before the text, of the answer cue, of each label word
{templates}]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), FOLDER).eval()
plain = model.get_base_model()
parts = load_file(f"{{FOLDER}}/prompt.safetensors")  # the whole prompt: here for its label bias and readout
"""

_TOKENS = """\

def tokens(text, beside, gap):
    \"\"\"Token ids of a text as it follows what stands before it.\"\"\"
    text = gap + " ".join(text.split()[:{max_words}])
    for first in beside or [""]:
        alone, both = (tokenizer(part, add_special_tokens=False).input_ids for part in (first, first + text))
        if both[: len(alone)] == alone:
            return both[len(alone) :][:{max_tokens}]
    raise ValueError(f"cannot tokenise {{text!r}}")
"""

_IN_CUE = """\

def logits(ids, more, tuned):
    \"\"\"Logits [1 + len(more), n_vocab] after ids, and after each of more.\"\"\"
    embeds = plain.get_input_embeddings()(torch.tensor([ids + more]))
    if tuned:  # the prompt stands in place of the cue's last tokens, where PEFT would put it first
        rows = model.get_prompt(batch_size=1)[0]
        embeds[0, len(ids) - len(rows) : len(ids)] = rows
    return plain(inputs_embeds=embeds).logits[0, -1 - len(more) :]
"""

_IN_FRONT = """\

def logits(ids, more, tuned):
    \"\"\"Logits [1 + len(more), n_vocab] after ids, and after each of more. PEFT puts the prompt before them.\"\"\"
    return (model if tuned else plain)(input_ids=torch.tensor([ids + more])).logits[0, -1 - len(more) :]
"""

_OF_TOKENS = """\
        after = logits(ids, [], tuned=i == 0)[0]
        scores = after[[word[0] for word in words]]
"""

_OF_WORDS = """\
        after = logits(ids, [], tuned=i == 0)[0]
        scores = []
        for word in words:  # the log-probability of all of its tokens
            said = logits(ids, word[:-1], tuned=i == 0).log_softmax(-1)
            scores.append(said[range(len(word)), word].sum())
        scores = torch.stack(scores)
"""

_LABELS = """\

@torch.no_grad()
def label_logits(text):
    \"\"\"[n_labels]: the likeliest label has the largest.\"\"\"
    readouts = [torch.cat([parts["label_bias"][None], parts.get("word_weights", torch.zeros(0, len(LABELS)))])]
    readouts += list(parts.get("other_weights", []))
    read_words = parts.get("word_ids", torch.zeros(0)).long()
    found = []
    for i, (before, beside, gap, cue, words) in enumerate(TEMPLATES):
        ids = [*before, *tokens(text, beside, gap), *cue]
{scores}        found.append(scores + torch.cat([torch.ones(1), after[read_words]]) @ readouts[i])
    return found[0] if len(found) == 1 else torch.stack(found).log_softmax(-1).mean(0)


print(LABELS[label_logits({example}).argmax()])
"""

_TEXT = """\

@torch.no_grad()
def next_logits(text):
    \"\"\"[n_vocab], of the token that follows the text.\"\"\"
    before, beside, gap, cue, _ = TEMPLATES[0]
    return logits([*before, *tokens(text, beside, gap), *cue], [], tuned=True)[0]


print(tokenizer.decode(next_logits({example}).argmax()))
"""


def snippet(prompt: Prompt, scorer: Scorer, task: Task, model: str, n_bos: int) -> str:
    """The code, runnable as it stands in the adapter's folder.

    Args:
        prompt: what the adapter holds.
        scorer: its model, whose token ids the code states.
        task: its task, which says how texts are cut.
        model: what transformers loads the weights from, a name or a folder.
        n_bos: how many of the adapter's virtual tokens stand for BOS.
    """
    known = known_model(prompt.model_name, prompt.model_fingerprint)
    quantised = known is not None and known.original == model
    templates = (prompt.template, *prompt.others)
    lines = [_line(prompt, scorer, template, n_bos if i == 0 else 0) for i, template in enumerate(templates)]
    name = one_line(prompt.model_name)  # it stands in a comment
    setup = _SETUP.format(
        model=json.dumps(model),
        weights="not quantised: logits differ a little" if quantised else f"the weights of {name}",
        labels=list(prompt.labels),
        templates="".join(lines),
    )
    place = _IN_CUE if prompt.spec.placement == "cue" else _IN_FRONT
    tokens = _TOKENS.format(max_words=task.max_words or "", max_tokens=task.max_text_tokens)
    return "\n".join([setup, tokens, place, _answer(prompt, scorer)])


def _line(prompt: Prompt, scorer: Scorer, template: Template, skipped: int) -> str:
    """One of TEMPLATES, without the ``skipped`` first token ids. The text goes on beside a neutral character."""
    head = split_pattern(template)[0]
    spoken = head.rstrip()
    before = head_ids(scorer, template).tolist()[skipped:]
    words = [word.tolist() for word in label_word_ids(scorer, template, prompt.labels)]
    beside, gap = ("".join(SENTINELS), head[len(spoken) :]) if spoken else ("", head)
    return f"    ({before}, {json.dumps(beside)}, {json.dumps(gap)}, {cue_ids(scorer, template).tolist()}, {words}),\n"


def _answer(prompt: Prompt, scorer: Scorer) -> str:
    if not prompt.labels:
        return _TEXT.format(example=json.dumps("A text"))
    templates = (prompt.template, *prompt.others)
    words = [word for template in templates for word in label_word_ids(scorer, template, prompt.labels)]
    scores = _OF_TOKENS if all(len(word) == 1 for word in words) else _OF_WORDS
    return _LABELS.format(scores=scores, example=json.dumps("A text"))
