"""Alternatives to fedbpt. Each peer has one method:

    score(prompt, texts, label_ids) -> logits float32 [len(texts), len(label_ids)]

``prompt``: float32 [n_prompt, n_embd], placed before each text; ``texts``: token-id arrays. The logits are those at
each text's last position.
"""


class UnavailableError(Exception):
    """A peer cannot run here; the message gives the reason and what to do."""
