"""Searches that `bench_learning.py` compares fedbpt with: SPSA, and back-propagation.

Each starts from the template and the bias of a fedbpt run, and uses the same prompt rows and mini-batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers.pytorch import load_gguf

import fedbpt
from fedbpt import tasks
from fedbpt.coordinator.clients.in_process import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.objective.objective import Objective
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Readout
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks.rows import batch_indices
from fedbpt.tasks.task import render_ids

Rows = list[tuple[str, int]]
Point = dict[str, Any]


def calibrated(
    scorer: fedbpt.NativeScorer, task: tasks.Task, train: Rows, settings: RunSettings
) -> tuple[Objective, Readout | None]:
    """The objective on the training rows, with the template and the bias from a run of one generation."""
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        clients = [InProcessClient(Device("d", scorer, train, task=task))]
        result = Federation(clients, task, settings, settings.aggregator(), store, "bench").run()
    objective = Objective(scorer, result.template, task.labels, train, settings.objective, settings.prompt)
    objective.readout = result.variants()["calibrated"][1]
    return objective, objective.readout


def spsa(args: argparse.Namespace, objective: Objective, settings: RunSettings) -> Iterator[Point]:
    """MeZO in the latent space, with plain SGD and step sizes proportional to 1/√t."""
    z, began, rng = np.zeros(settings.prompt.d), time.perf_counter(), generator(settings.seed, "spsa")
    step = 0
    for budget in args.evaluations:
        while 2 * step < budget:
            chosen = batch_indices(len(objective), args.batch, rng, objective.targets)
            direction = rng.standard_normal(len(z))
            pair = objective.losses(objective.embeds(np.stack([z + 0.1 * direction, z - 0.1 * direction])), chosen)
            z -= args.rate / np.sqrt(1 + step / 100) * (pair[0] - pair[1]) / 0.2 * direction
            step += 1
        yield {
            "evaluations": 2 * step,
            "tokens": objective.tokens,
            "seconds": time.perf_counter() - began,
            "rows": objective.embeds(z[None])[0],
        }


def backprop(args: argparse.Namespace, objective: Objective, train: Rows, settings: RunSettings) -> Iterator[Point]:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980) on the rows themselves, in place of the cue's last tokens."""
    scorer, template = objective.scorer, objective.template
    model = load_gguf(scorer.path, scorer.n_threads).requires_grad_(False)
    import torch

    texts = [render_ids(scorer, template, text, settings.objective.max_text_tokens) for text, _ in train]
    labels = torch.from_numpy(np.concatenate(objective.label_word_ids)).long()
    bias = torch.from_numpy(objective.readout.weights.numpy()[0]).float()
    prompt = torch.from_numpy(objective.zero_shot_embeds()[0].copy()).requires_grad_()
    adam = torch.optim.Adam([prompt], lr=args.rate * scorer.embedding_std)
    began, rng, step, tokens = time.perf_counter(), generator(settings.seed, "backprop"), 0, 0
    for budget in args.evaluations:
        while step < budget:
            chosen = batch_indices(len(objective), args.batch, rng, objective.targets)
            ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(texts[i]).long() for i in chosen], batch_first=True)
            lengths = torch.tensor([len(texts[i]) for i in chosen])
            places = lengths[:, None] - len(prompt) + torch.arange(len(prompt))
            at = torch.arange(len(chosen))[:, None]
            embeds = model.get_input_embeddings()(ids).index_put((at, places), prompt)
            hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[at[:, 0], lengths - 1]
            logits = hidden @ model.lm_head.weight[labels].T + bias
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(objective.targets[chosen]).long())
            adam.zero_grad()
            loss.backward()
            adam.step()
            step, tokens = step + 1, tokens + 3 * int(lengths.sum())  # a backward pass costs two forward passes
        yield {
            "evaluations": step,
            "tokens": tokens,
            "seconds": time.perf_counter() - began,
            "rows": prompt.detach().numpy().copy(),
        }
