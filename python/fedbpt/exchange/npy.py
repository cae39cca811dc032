"""Prompts as NumPy files of their rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fedbpt.prompts.model_card import model_card
from fedbpt.prompts.prompt import Prompt, card_path, encode_card, write


def write_npy(prompt: Prompt, target: Path) -> Path:
    """Write the rows, float32 [n_prompt, n_embd], with a model card. Raises `PromptError` if that fails."""
    content = io.BytesIO()
    np.save(content, prompt.rows, allow_pickle=False)
    use = f"```python\nimport numpy as np\n\nrows = np.load({target.name!r})  # input embeddings, one per row\n```\n\n"
    card = model_card(prompt, use + "".join(f"{note}\n" for note in notes(prompt)), "numpy")
    write({target: content.getvalue(), card_path(target): encode_card(card)})
    return target


def notes(prompt: Prompt) -> tuple[str, ...]:
    """The parts of the prompt that the file lacks, one line each."""
    if prompt.label_bias.any() or prompt.n_words or prompt.others or prompt.layer_readout is not None:
        return ("The file only holds the rows: for label bias and readout, use the prompt file or --to gguf.",)
    return ()
