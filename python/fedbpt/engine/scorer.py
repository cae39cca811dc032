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

        With continuations [n_candidates, n, K + n_labels]: their log-probabilities, then the logits.
        Args and errors as for `Scorer.score_with_soft_prompt`. A candidate's logits depend on ``indices`` and on no
        other candidate or call.
        """
        ...

    def score_states(
        self, embeds: ArrayLike, indices: ArrayLike | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What `score` returns, and the states of the plan's layers [n_candidates, n, n_layers, n_embd], in one pass.

        A state is what a layer adds up to at a text's last token, before the next layer's norm.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """What the layers above ask of a model. Implementations are deterministic: same call, same bits."""

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
        """What to call the model in a message to a person."""
        ...

    @property
    def fingerprint(self) -> str:
        """``sha256:…`` of the model file; two files with equal fingerprints give equal logits."""
        ...

    @property
    def backend(self) -> str: ...

    @property
    def shares_beginnings(self) -> bool:
        """Whether a text in ``cue`` placement costs no more than its end while the KV of one that begins alike, of the
        last few or of a plan's, is there. The bits are the same."""
        ...

    @property
    def embedding_std(self) -> float:
        """Standard deviation over all entries of the token embedding table, as the graph sees it."""
        ...

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        """Token ids [n]. ``add_bos`` None: as the model was trained."""
        ...

    def token_embeddings(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Input embeddings [len(ids), n_embd] of tokens, in the scale that soft prompt rows have."""
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
        keep_kv: bool = True,
    ) -> Plan:
        """Lay a data set out for scoring many times; arguments as for `score_with_soft_prompt`.

        ``cue``: token ids that follow each text. ``continuations``: for each text the K token-id sequences that may
        follow it; their log-probabilities, nats, come before the logits, and no ``label_ids`` means no logits then.
        ``layers``: those whose states `Plan.score_states` gives, ascending; ``label_ids`` may then be empty.
        ``keep_kv`` False: for one pass over it; nothing is kept of the
        texts' KV.
        """
        ...

    def score_with_soft_prompt(
        self,
        tokens: Sequence[ArrayLike],
        embeds: ArrayLike,
        label_ids: ArrayLike | None = None,
        placement: Placement = "front",
        prefix: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Logits [n_candidates, len(tokens), n_labels] at each text's last position under each candidate prompt.

        Args:
            tokens: N token-id sequences.
            embeds: float32 [n_candidates, n_prompt, n_embd], or [n_prompt, n_embd] for one candidate. n_prompt
                may be 0: no soft prompt.
            label_ids: token ids whose logits to return; None: all n_vocab.
            placement: ``front``: prefix, then the rows, then the text. ``cue``: prefix, then the text, with the
                rows in place of the text's last n_prompt tokens.
            prefix: token ids before everything, shared by all texts (BOS, an instruction).

        Raises:
            InputError: wrong n_embd, NaN or infinity, an empty text, a text longer than the context, a token id
                outside the vocabulary.
            ScoringInterrupted: the call was cancelled.
        """
        ...

    def interrupt(self) -> None:
        """Make the scoring call in flight, on whatever thread, raise `ScoringInterrupted`; there may be none."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Bytes by part: ``weights``, ``kv``, ``compute``, ``rss``, ``peak_rss``."""
        ...
