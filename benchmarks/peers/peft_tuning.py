"""Prompt tuning by back-propagation with Hugging Face PEFT (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import UnavailableError


def tuning_step(
    model: Any, texts: Sequence[NDArray[np.int32]], targets: Sequence[int], n_prompt: int, batch: int
) -> float:
    """Do one AdamW step of a ``n_prompt``-token soft prompt on all ``texts``; returns the mean loss.

    Args:
        targets: the token id to predict after each text.
        batch: texts per forward and backward pass; gradients are accumulated over them.

    Raises:
        UnavailableError: PEFT is not installed.
    """
    try:
        import torch
        from peft import PromptTuningConfig, TaskType, get_peft_model
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed: pip install '.[bench]'") from error
    tuned = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=n_prompt))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    total = 0.0
    for start in range(0, len(texts), batch):
        chosen = [np.append(texts[i], targets[i]) for i in range(start, min(start + batch, len(texts)))]
        ids = torch.zeros((len(chosen), max(map(len, chosen))), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, text in enumerate(chosen):
            ids[row, : len(text)] = torch.from_numpy(text)
            mask[row, : len(text)] = 1
            labels[row, len(text) - 1] = int(text[-1])  # the loss only counts the answer
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels).loss * (len(chosen) / len(texts))
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total
