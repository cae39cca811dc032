"""The `Scorer` protocol: a frozen language model that scores texts under soft prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.protocol.specs import Placement


class Plan(Protocol):
    """A data set laid out once for scoring, from `Scorer.compile`."""

    @property
    def n_texts(self) -> int: ...

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed for this plan so far."""
        ...

    def score(self, embeds: ArrayLike, indices: ArrayLike | None = None) -> NDArray[np.float32]:
        """Logits [n_candidates, n, n_labels] of the texts ``indices`` [n] (None: all) under each candidate prompt.

        With continuations, [n_candidates, n, K + n_labels]: their log-probabilities in nats, then the logits.
        Arguments and errors as for `Scorer.score_with_soft_prompt`. A candidate's logits depend on ``indices``, but
        not on other candidates or calls.
        """
        ...

    def score_states(
        self, embeds: ArrayLike, indices: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """As `score`, with the hidden states of the plan's layers [n_candidates, n, n_layers, n_embd], in one pass.

        A hidden state is a layer's output at a text's last token, before the next layer's norm.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """A model that scores texts. Implementations are deterministic: same call, same bits."""

    @property
    def n_embd(self) -> int: ...

    @property
    def n_layer(self) -> int: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def n_ctx_train(self) -> int:
        """The longest sequence that the model was trained on, in tokens."""
        ...

    @property
    def architecture(self) -> str: ...

    @property
    def name(self) -> str:
        """Display name of the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """``sha256:…`` of the model file; two files with equal fingerprints give equal logits."""
        ...

    @property
    def backend(self) -> str: ...

    @property
    def shares_beginnings(self) -> bool:
        """Whether texts in ``cue`` placement reuse the KV of a common prefix with recent texts or those of a plan.

        Only the rest is computed then; results are the same bit for bit.
        """
        ...

    @property
    def embedding_std(self) -> float:
        """Standard deviation over all entries of the token embedding table, after the model's embedding scale."""
        ...

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Token ids [n]. ``add_bos`` None: as the model was trained."""
        ...

    def token_embeddings(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Input embeddings [len(ids), n_embd] of tokens, in the scale of soft prompt rows."""
        ...

    def compile(
        self,
        texts: Sequence[ArrayLike],
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: ArrayLike | None = None,
        cue: ArrayLike | None = None,
        *,
        continuations: Sequence[Sequence[ArrayLike]] | None = None,
        layers: Sequence[int] | None = None,
        layer: int | None = None,
        keep_kv: bool = True,
    ) -> Plan:
        """Prepare a data set for repeated scoring; arguments as for `score_with_soft_prompt`.

        ``cue``: token ids appended to each text. ``continuations``: for each text, the K token-id sequences to score;
        their log-probabilities come before the logits, and ``label_ids`` None then means no logits.
        ``layers``: those whose states `Plan.score_states` returns, ascending; ``label_ids`` may then be empty.
        ``keep_kv`` False: for a single pass; the texts' KV is not kept.
        """
        ...

    def score_with_soft_prompt(
        self,
        tokens: Sequence[ArrayLike],
        embeds: ArrayLike,
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: ArrayLike | None = None,
        layer: int | None = None,
    ) -> NDArray[np.float32]:
        """Logits [n_candidates, len(tokens), n_labels] at each text's last position under each candidate prompt.

        Args:
            tokens: N token-id sequences.
            embeds: float32 [n_candidates, n_prompt, n_embd], or [n_prompt, n_embd] for one candidate. n_prompt
                may be 0: no soft prompt.
            label_ids: token ids whose logits to return; None: all n_vocab.
            placement: ``front``: prefix, then the rows, then the text. ``cue``: prefix, then the text, with the
                rows in place of the text's last n_prompt tokens. ``layer``: the one row is added to the output of
                ``layer`` at the text's last token. ``layers``: n_layer rows, each added to the output of its layer, at
                the text's last token and those of continuations.
            prefix: token ids before everything, shared by all texts (BOS, an instruction).

        Raises:
            InputError: wrong n_embd, NaN or infinity, an empty text, a text longer than the context, a token id
                outside the vocabulary.
            ScoringInterrupted: the call was cancelled.
        """
        ...

    def interrupt(self) -> None:
        """Make the scoring call in flight, on whatever thread, raise `ScoringInterrupted`; does nothing without one."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes by part: ``weights``, ``kv``, ``compute``, ``rss``, ``peak_rss``."""
        ...
