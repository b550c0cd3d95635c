"""The fused decode step: the next token or tokens of several sequences through all layers in one C call.

What it reads is found through tables of addresses. Their columns are the enums of `decode_step.c`, read from its text
so that they stand in one place.
"""

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rorqual.ops.native.library import call

_SOURCE = Path(__file__).with_name("decode_step.c")


@lru_cache(maxsize=4)
def columns(name: str) -> tuple[str, ...]:
    """Columns of the table `Shape`, `Number`, `Layer`, `Memory`, `Head` or `Draft`, in order, in lower case."""
    found = re.search(rf"enum {name} \{{([^}}]*)\}}", _SOURCE.read_text())
    assert found is not None, name
    names = [word.strip().lower() for word in found.group(1).split(",")]
    assert names[-1] == f"{name.lower()}_end"
    return tuple(names[:-1])


def decode_step(
    embedding: Tensor, tokens: Tensor, positions: Tensor, first: Tensor, shape: Tensor, numbers: Tensor, layers: Tensor,
    memory: Tensor, tables: Tensor, streams: int, head: Tensor | None, wanted: Tensor | None, choices: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Streams [R, N, D] after all layers; tokens, positions and first int64 [R], tables as the C source says.

    With `head`, what follows the rows in `wanted` int64 [W] too: hidden states [W, D], logits fp32 [W, choices] and the
    first of the largest int64 [W] (a NaN counts as the largest). The sequences' memory has taken the tokens in
    afterwards. Every address must be that of a living tensor.
    """
    rows, count = tokens.shape[0], 0 if head is None or wanted is None else wanted.shape[0]
    out = embedding.new_empty(rows, streams, embedding.shape[1])
    hidden, best = embedding.new_empty(count, embedding.shape[1]), tokens.new_empty(count)
    logits = torch.empty(count, choices)
    call(
        "decode_step", embedding, tokens, positions, first, rows, shape, numbers, layers, memory, tables, out, head,
        wanted, count, choices, hidden, logits, best,
    )  # fmt: skip
    return out, hidden, logits, best


def draft_step(
    trunk: Tensor, tokens: Tensor, position: int, most: int, choices: int, shape: Tensor, numbers: Tensor,
    layer: Tensor, memory: Tensor, module: Tensor, head: Tensor, kept: Tensor, least: float,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Drafts after trunk streams [R, N, D] of tokens that are followed by `tokens` int64 [R], and their probabilities.

    `kept` and `least` say when to stop: see the C source, as for the tables. The module's memory holds R tokens more.
    """
    rows = trunk.shape[0]
    room = torch.cat([tokens, tokens.new_zeros(most)])
    chances, count = torch.empty(most), torch.empty(1, dtype=torch.int64)
    call(
        "draft_step", trunk, room, position, rows, most, choices, shape, numbers, layer, memory, module, head,
        kept, kept.shape[0], kept.shape[1], least, chances, count,
    )  # fmt: skip
    made = int(count)
    return room[rows : rows + made].tolist(), chances[:made].tolist()
