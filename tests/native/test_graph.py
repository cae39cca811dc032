"""The fork against upstream's own graphs, recorded from the unpatched release by vendor/llama.cpp/record_graphs.py.

A graph is a list of lines, one per node and leaf (weight, KV cache, input), in the form that trace.h describes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_case import Case

from fedbpt import _native

pytestmark = pytest.mark.skipif(
    not hasattr(_native, "GraphTrace"),
    reason="built without -DFEDBPT_TRACE=ON, as wheels are: make setup builds with it",
)

RECORDING: dict[str, Any] = json.loads((Path(__file__).parent / "upstream_graphs.json").read_text())
UPSTREAM = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "UPSTREAM.toml"
TOKENS: list[int] = RECORDING["tokens"]


@dataclass(frozen=True)
class Recorded:
    """Upstream's graph of one decode, and the fork on the same model file."""

    nodes: list[str]
    trace: _native.GraphTrace

    def plain(self, pos0: int = 0, seq: int = 0) -> list[str]:
        """The fork's graph of TOKENS."""
        return self.trace.decode(TOKENS, seq=seq, pos0=pos0)

    def soften(self, pos0: int, seq: int = 0, n_rows: int = 2) -> None:
        """Set soft rows from ``pos0`` on."""
        self.trace.set_soft_prompt(seq, pos0, np.full((n_rows, self.trace.n_embd), 0.5, np.float32))


@pytest.fixture(params=RECORDING["graphs"], ids=lambda graph: f"{graph['model']}-{graph['weights']}")
def recorded(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Recorded:
    """Each recorded graph."""
    graph = request.param
    path = case_of(graph["model"], graph["weights"]).path
    return Recorded(graph["nodes"], _native.GraphTrace(str(path), flash_attention=graph["flash_attention"]))


def with_soft_rows(nodes: list[str]) -> list[str]:
    """Insert one MUL and one ADD after the look-up of token embeddings into upstream's ``nodes``."""
    weights, tokens, look_up, *rest = nodes
    match = re.fullmatch(r"%0 GET_ROWS (f32 \[\d+,(\d+)\]) embd <- token_embd\.weight inp_tokens", look_up)
    assert match is not None, look_up
    rows, n_tokens = match.groups()
    soft = [
        f"%0 GET_ROWS {rows} <- token_embd.weight inp_tokens",
        f"LEAF f32 [1,{n_tokens}] soft_prompt_keep",
        f"%1 MUL {rows} <- %0 soft_prompt_keep",
        f"LEAF {rows} soft_prompt_rows",
        f"%2 ADD {rows} embd <- %1 soft_prompt_rows",
    ]
    two_later = [re.sub(r"%(\d+)", lambda number: f"%{int(number[1]) + 2}", line) for line in rest]
    return [weights, tokens, *soft, *two_later]


def test_the_recording_is_of_the_pinned_release() -> None:
    assert f'sha256 = "{RECORDING["upstream"]}"' in UPSTREAM.read_text(), "run vendor/llama.cpp/record_graphs.py again"


def test_without_a_soft_prompt_the_graph_is_upstreams_node_for_node(recorded: Recorded) -> None:
    assert recorded.plain() == recorded.nodes


def test_with_a_soft_prompt_the_graph_is_upstreams_plus_one_mul_and_one_add(recorded: Recorded) -> None:
    recorded.soften(pos0=1)

    assert recorded.plain() == with_soft_rows(recorded.nodes)


def test_after_a_soft_prompt_was_used_and_cleared_the_graph_is_upstreams_again(recorded: Recorded) -> None:
    recorded.soften(pos0=0)
    assert recorded.plain() != recorded.nodes

    recorded.trace.clear_soft_prompt()

    assert recorded.plain(pos0=len(TOKENS)) == recorded.nodes


def test_rows_of_another_sequence_or_of_other_positions_leave_the_graph_upstreams(recorded: Recorded) -> None:
    recorded.soften(pos0=0, seq=1)
    assert recorded.plain(seq=0) == recorded.nodes

    recorded.soften(pos0=0, seq=2)
    recorded.soften(pos0=len(TOKENS), seq=2)
    assert recorded.plain(seq=2) == recorded.nodes


def test_a_graph_is_reused_only_for_tokens_of_its_kind(recorded: Recorded) -> None:
    n = len(TOKENS)
    soft = with_soft_rows(recorded.nodes)
    kinds = [False, False, True, True, False, True]

    seen = []
    reused = []
    for index, is_soft in enumerate(kinds):
        recorded.trace.clear_soft_prompt()
        if is_soft:
            recorded.soften(pos0=index * n)
        seen.append(recorded.plain(pos0=index * n))
        reused.append(recorded.trace.n_reused)

    assert seen == [soft if is_soft else recorded.nodes for is_soft in kinds]
    assert reused == [0, 1, 1, 2, 2, 2]  # the second of each pair reuses its predecessor's graph
