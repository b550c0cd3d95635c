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
    """Columns of the table `Shape`, `Number`, `Layer`, `Memory` or `Draft`, in order, in lower case."""
    found = re.search(rf"enum {name} \{{([^}}]*)\}}", _SOURCE.read_text())
    assert found is not None, name
    names = [word.strip().lower() for word in found.group(1).split(",")]
    assert names[-1] == f"{name.lower()}_end"
    return tuple(names[:-1])


def decode_step(
    embedding: Tensor, tokens: Tensor, positions: Tensor, first: Tensor, shape: Tensor, numbers: Tensor, layers: Tensor,
    memory: Tensor, tables: Tensor, streams: int,
) -> Tensor:  # fmt: skip
    """Streams [R, N, D] after all layers; tokens, positions and first int64 [R], tables as the C source says.

    The sequences' memory has taken the tokens in afterwards. Every address must be that of a living tensor.
    """
    rows = tokens.shape[0]
    out = torch.empty(rows, streams, embedding.shape[1], dtype=embedding.dtype)
    call("decode_step", embedding, tokens, positions, first, rows, shape, numbers, layers, memory, tables, out)
    return out


def draft_step(
    trunk: Tensor, tokens: Tensor, position: int, most: int, choices: int, shape: Tensor, numbers: Tensor,
    layer: Tensor, memory: Tensor, module: Tensor, kept: Tensor, least: float,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Drafts after trunk streams [R, N, D] of tokens that are followed by `tokens` int64 [R], and their probabilities.

    `kept` and `least` say when to stop: see the C source, as for the tables. The module's memory holds R tokens more.
    """
    rows = trunk.shape[0]
    room = torch.cat([tokens, tokens.new_zeros(most)])
    chances, count = torch.empty(most), torch.empty(1, dtype=torch.int64)
    call(
        "draft_step", trunk, room, position, rows, most, choices, shape, numbers, layer, memory, module, kept,
        kept.shape[0], kept.shape[1], least, chances, count,
    )  # fmt: skip
    made = int(count)
    return room[rows : rows + made].tolist(), chances[:made].tolist()
