"""The result of `fedbpt.check_model`."""

from __future__ import annotations

import msgspec

CHECKS = {
    "loads": "loads",
    "tokenizes": "tokens = text",
    "repeats": "independent of batch",
    "rows": "rows = tokens",
    "labels": "label logits = all logits",
    "generates": "generator = scorer",
}
"""The checks in order, with their titles. The model loads; tokens decode to the text byte for byte; logits depend on no
other text or candidate of the call and on no earlier call; a soft prompt of token embeddings scores as the tokens;
the logits of only the label words equal those among the whole vocabulary; generated tokens have the log-probabilities
that scoring gives them."""


class Finding(msgspec.Struct, frozen=True, tag=True):
    """The outcome of one of `CHECKS`. ``holds``: None if it was not run; ``seconds``: its duration."""

    name: str
    holds: bool | None
    detail: str = ""
    seconds: float = 0.0


class ModelFacts(msgspec.Struct, frozen=True, tag=True):
    """Properties of a model that loads. ``size``: bytes of all parts; ``n_ctx``: tokens."""

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
    """Whether it has a chat template."""
    fingerprint: str
    notes: tuple[str, ...]
    """Differences between llama.cpp and the model's reference implementation."""


class ModelCheck(msgspec.Struct, frozen=True):
    """The result for a model file, with one finding for each of `CHECKS`. ``facts``: None if it does not load."""

    path: str
    facts: ModelFacts | None
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether all checks were run and hold."""
        return all(finding.holds for finding in self.findings)
