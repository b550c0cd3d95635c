"""Which compressed entries the indexer picked while an answer was written: the finished request is run once more.

Nothing is recorded while requests run. Looking back costs one pass over the prompt and one over the answer with a
`Trace`; where the arithmetic is bitwise (`exactness.py`) the picks are those of the first run, to the last one. Picks
are counted on a grid, rows of answer tokens by blocks of context, so that memory does not grow with top-k.

A row's token was sampled from the query before it, so the picks are those of the query at its position less one.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import RequestError
from rorqual.model import Segment, State, Transformer
from rorqual.model.guard import Guard
from rorqual.model.trace import Trace

MOST_TOKENS = 32_768
"""Of prompt and answer together, that are run again."""
MOST_ROWS, MOST_BLOCKS = 96, 192
READ, TRACED = 128, 32
"""Tokens of a piece: of the prompt, and of the answer."""


@dataclass(frozen=True)
class LayerPicks:
    """One CSA layer. `picked` and `seen` int64 [rows, blocks]: entries that were picked, and that could have been,
    summed over the row's tokens. `mass` fp32 likewise: what attention over all of them, without the window, would have
    put there, mean over heads and summed over tokens.
    """

    layer: int
    entry_tokens: int
    picked: Tensor
    seen: Tensor
    mass: Tensor


@dataclass(frozen=True)
class Picks:
    """Rows are `row_tokens` tokens of the answer each, blocks `block_tokens` tokens of prompt and answer."""

    prompt_tokens: int
    output_tokens: int
    row_tokens: int
    block_tokens: int
    num_rows: int
    num_blocks: int
    top_k: int
    layers: tuple[LayerPicks, ...]


def check_picks(model: Any, num_prompt: int, num_output: int) -> None:  # Any: a LanguageModel
    """Raises: RequestError when there is nothing to show, or too much to run again."""
    if not isinstance(model, Transformer) or not any(spec.has_indexer for spec in model.cfg.layers):
        raise RequestError(
            "This model has no lightning indexer, so nothing was picked: its layers read all they remember. Ask a "
            "model with compressed sparse attention.",
        )
    if num_output < 1:
        raise RequestError("The answer has no token, so no query picked anything. Ask about one that has.")
    if num_prompt + num_output > MOST_TOKENS:
        raise RequestError(
            f"The answer and its prompt hold {num_prompt + num_output:,} tokens, and to find the picks they would all "
            f"be run again. That is done up to {MOST_TOKENS:,}. Ask about a shorter conversation."
        )


def find_picks(
    model: Transformer, prompt: Sequence[int], output: Sequence[int], guard: Guard | None = None
) -> Generator[None, None, Picks]:
    """Run prompt and output again, in pieces for `Engine.aside`; returns the picks. Raises as `check_picks`.

    guard: the answer's, which then counts as a picker too.
    """
    check_picks(model, len(prompt), len(output))
    layers = [spec for spec in model.cfg.layers if spec.has_indexer]
    row_tokens = -(-len(output) // MOST_ROWS)
    grain = math.lcm(*(spec.compress_ratio for spec in layers))
    total = len(prompt) + len(output)
    block_tokens = grain * max(1, -(-total // (grain * MOST_BLOCKS)))
    shape = -(-len(output) // row_tokens), -(-total // block_tokens)
    found = {
        spec.index: LayerPicks(
            spec.index,
            spec.compress_ratio,
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(shape),
        )
        for spec in layers
    }
    state = model.new_state(1)
    state.guard_by(None if guard is None else guard.anew())
    first = len(prompt) - 1  # the query that chose the first token
    for at in range(0, first, READ):
        model.step([Segment(state, list(prompt[at : min(at + READ, first)]))])
        yield
    queries = [prompt[-1], *output[:-1]]
    for at in range(0, len(queries), TRACED):
        _trace(model, state, queries[at : at + TRACED], at, row_tokens, block_tokens, found)
        yield
    return Picks(
        len(prompt), len(output), row_tokens, block_tokens, *shape, model.cfg.index_topk, tuple(found.values())
    )


def _trace(
    model: Transformer,
    state: State,
    queries: Sequence[int],
    number: int,
    row_tokens: int,
    block_tokens: int,
    found: dict[int, LayerPicks],
) -> None:
    """Run some queries, of which the first chose answer token `number`, and count what they picked."""
    begin = state.lengths[0]
    trace = Trace(capture=[f"layers.{i}.attn.{part}" for i in found for part in ("index_used", "q", "entries")])
    model.forward_streams(torch.tensor([queries], device=model.reference.device), state=state, trace=trace)
    rows_T = torch.arange(number, number + len(queries)) // row_tokens
    for index, layer in found.items():
        picks_Tk = trace.captured[f"layers.{index}.attn.index_used"][0].cpu()
        blocks_Tk = picks_Tk.clamp_min(0) * layer.entry_tokens // block_tokens
        places_Tk = rows_T[:, None] * layer.picked.shape[1] + blocks_Tk
        layer.picked.view(-1).index_add_(0, places_Tk.flatten(), (picks_Tk >= 0).long().flatten())
        ends_T = (begin + 1 + torch.arange(len(queries))) // layer.entry_tokens  # entries complete at the query
        edges_B = torch.arange(layer.seen.shape[1]) * (block_tokens // layer.entry_tokens)
        seen_TB = (ends_T[:, None] - edges_B).clamp(0, block_tokens // layer.entry_tokens)
        layer.seen.index_add_(0, rows_T, seen_TB)
        if f"layers.{index}.attn.entries" in trace.captured:
            q_THK, entries_CK = (trace.captured[f"layers.{index}.attn.{part}"][0].float() for part in ("q", "entries"))
            logits_THC = (q_THK @ entries_CK.T).mul_(q_THK.shape[-1] ** -0.5).cpu()
            is_seen = torch.arange(entries_CK.shape[0]) < ends_T[:, None]
            mass_TC = logits_THC.masked_fill_(~is_seen[:, None], -math.inf).softmax(-1).mean(1).nan_to_num_(0.0)
            blocks_C = torch.arange(entries_CK.shape[0]) * layer.entry_tokens // block_tokens
            mass_TB = torch.zeros(len(queries), layer.mass.shape[1]).index_add_(1, blocks_C, mass_TC)
            layer.mass.index_add_(0, rows_T, mass_TB)
