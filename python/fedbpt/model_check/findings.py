"""What `fedbpt.check_model` says of a model file."""

from __future__ import annotations

import msgspec

CHECKS = {
    "loads": "loads",
    "tokenizes": "tokens = text",
    "repeats": "same in any company",
    "rows": "rows = tokens",
    "labels": "labels alone = among all",
    "generates": "generator = scorer",
}
"""What is checked, in this order: it loads; texts come back from their tokens byte for byte; logits do not depend on
what is scored beside a text or a candidate, or was before; rows that are token embeddings score as the tokens; label
words score alone as among the whole vocabulary; generated tokens have the log-probabilities that scoring gives them."""


class Finding(msgspec.Struct, frozen=True, tag=True):
    """One of `CHECKS`: whether it holds, None where it was not tried; what was found; seconds that it took."""

    name: str
    holds: bool | None
    detail: str = ""
    seconds: float = 0.0


class ModelFacts(msgspec.Struct, frozen=True, tag=True):
    """What a file that loads is. Sizes in bytes, of all its parts; ``n_ctx`` tokens."""

    architecture: str
    n_params: int
    size: int
    n_files: int
    formats: tuple[str, ...]
    """ggml types of the layers' matrices, most parameters first."""
    n_ctx: int
    n_vocab: int
    n_embd: int
    chat: bool
    """Whether messages can be put to it in a chat template of its own."""
    fingerprint: str
    notes: tuple[str, ...]
    """What llama.cpp computes otherwise than the model's makers do."""


class ModelCheck(msgspec.Struct, frozen=True):
    """The outcome for the file at ``path``; ``facts`` None where it does not load. One finding for each of `CHECKS`."""

    path: str
    facts: ModelFacts | None
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether everything was tried and holds."""
        return all(finding.holds for finding in self.findings)
