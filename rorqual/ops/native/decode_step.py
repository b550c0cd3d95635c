"""The fused decode step: the next token or tokens of several sequences through all layers in one C call.

What it reads is found through tables of addresses. Their columns are the enums of `decode_step.c`, read from its text
so that they stand in one place.
"""

import re
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rorqual.ops.native.library import address, kernel

_SOURCE = Path(__file__).with_name("decode_step.c")


@lru_cache(maxsize=4)
def columns(name: str) -> tuple[str, ...]:
    """Columns of the table `Shape`, `Number`, `Layer`, `Memory`, `Head` or `Draft`, in order, in lower case."""
    found = re.search(rf"enum {name} \{{([^}}]*)\}}", _SOURCE.read_text())
    assert found is not None, name
    names = [word.strip().lower() for word in found.group(1).split(",")]
    assert names[-1] == f"{name.lower()}_end"
    return tuple(names[:-1])


class Network:
    """What the step reads of a model: its embedding [V, D] and tables, as the C source says.

    head: None where logits are never asked for. Every address in the tables must be that of a living tensor.
    """

    def __init__(self, embedding: Tensor, shape: Tensor, numbers: Tensor, layers: Tensor, head: Tensor | None) -> None:
        self.shape, self.numbers, self.head = shape, numbers, head
        self._size = tuple(shape[[columns("Shape").index(name) for name in ("streams", "hidden")]].tolist())
        self._dtype = embedding.dtype
        self._function, dtypes = kernel("decode_step", embedding.dtype is torch.bfloat16)
        self._kept = (embedding, shape, numbers, layers, head)
        given = zip(self._kept, dtypes, strict=False)
        self._addresses = [0 if tensor is None else address("decode_step", tensor, dtype) for tensor, dtype in given]

    def room(self, *lead: int) -> Tensor:
        """Streams [*lead, N, D] that hold anything."""
        return torch.empty(*lead, *self._size, dtype=self._dtype)

    def step(
        self, places: Sequence[int], num_rows: int, wanted: Sequence[int] = (), choices: int = 0, *, is_batch: bool,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[int]]:  # fmt: skip
        """Streams [1, R, N, D] of R rows after all layers. The sequences' memory has taken the tokens in afterwards.

        places: of each row token, position, first row of its sequence, addresses of its pages and of its memory; first
        all tokens, then all positions, and so on. wanted: rows behind which hidden states [1, W, D], logits fp32
        [1, W, choices] and the first of the largest logits are wanted too (a NaN counts as the largest).
        is_batch: tensors with the rows in the first dimension instead, [R, 1, ...]. out: where the streams are to lie.
        """
        count, hidden_size = len(wanted), self._size[1]
        lead, wanted_lead = ((num_rows, 1), (count, 1)) if is_batch else ((1, num_rows), (1, count))
        if out is None:
            out = self.room(*lead)
        hidden, logits = torch.empty(*wanted_lead, hidden_size, dtype=self._dtype), torch.empty(*wanted_lead, choices)
        # plain arrays: a tensor of a few numbers takes longer to make than they take to be read
        rows, asked, best = array("q", places), array("q", wanted), array("q", wanted)
        self._function(
            *self._addresses, rows.buffer_info()[0], num_rows, asked.buffer_info()[0], count, choices,
            out.data_ptr(), hidden.data_ptr(), logits.data_ptr(), best.buffer_info()[0],
        )  # fmt: skip
        return out, hidden, logits, best.tolist()


class Drafter:
    """What the draft step reads of an MTP module, in `dtype`: tables as the C source says. `kept` lives as long."""

    def __init__(
        self, dtype: torch.dtype, shape: Tensor, numbers: Tensor, layer: Tensor, module: Tensor, head: Tensor,
        kept: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.dtype = dtype
        self._function, _ = kernel("draft_step", dtype is torch.bfloat16)
        self._kept = (shape, numbers, layer, module, head, kept)
        self._shape, self._numbers, self._layer = shape.data_ptr(), numbers.data_ptr(), layer.data_ptr()
        self._module, self._head = module.data_ptr(), head.data_ptr()

    def step(
        self, trunk: Tensor, tokens: Sequence[int], position: int, most: int, choices: int, memory: Tensor,
        kept: Tensor, least: float,
    ) -> tuple[list[int], list[float]]:  # fmt: skip
        """Drafts after trunk streams [R, N, D], contiguous and of any float type, of tokens that are followed by the R
        `tokens`, and their probabilities.

        kept fp32 [places, bins] and `least` say when to stop: see the C source. The module's memory, whose addresses
        are in `memory`, holds R tokens more.
        """
        rows, trunk = trunk.shape[0], trunk.to(self.dtype)
        room, chances, count = array("q", tokens), array("f", bytes(4 * most)), array("q", (0,))
        room.frombytes(bytes(8 * most))
        self._function(
            trunk.data_ptr(), room.buffer_info()[0], position, rows, most, choices, self._shape, self._numbers,
            self._layer, memory.data_ptr(), self._module, self._head, kept.data_ptr(), kept.shape[0], kept.shape[1],
            least, chances.buffer_info()[0], count.buffer_info()[0],
        )  # fmt: skip
        made = count[0]
        return room[rows : rows + made].tolist(), chances[:made].tolist()
