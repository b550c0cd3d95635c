"""Getting rows of an Engram table to where they are used, ahead of use, and their gradients back.

A table may be larger than the device's memory: then it stays in main memory, and a thread gathers the different rows
that a call (or a whole training step) needs while the blocks before it compute. Addresses depend on token ids alone, so
they are known before anything runs. Gradients never take the table's shape: they are summed per row, in the order of
the tokens, and go back as rows (a sparse gradient) unless the table is small.
Source: Engram paper, section 2.3 (prefetch); the table's updates are in `train/`, its sharding in `parallel/`.

R rows of the table, W channels of a row, U different rows of a call, H tables of the layer.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.ops.device import staged

SPARSE_ABOVE = 10_000_000
"""Rows of a table above which its gradient is sparse and its optimizer touches only the rows in it."""


class RowSource(Protocol):
    """Where the rows of a table are: here (`LocalRows`), or spread over processes (`parallel/engram.py`)."""

    def fetch(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows (int64 [U], rising) of the whole table -> their values [U, W] on the table's device."""

    def gradient(self, table: Tensor, rows: Tensor, values: Tensor, sparse: bool) -> Tensor:
        """The gradient of `table` (what this process holds of it) from those of fetched rows, [U, W]."""


class LocalRows:
    """The whole table is in this process."""

    def fetch(self, table: Tensor, rows: Tensor) -> Tensor:
        """See `RowSource`."""
        return table.detach().index_select(0, rows)

    def gradient(self, table: Tensor, rows: Tensor, values: Tensor, sparse: bool) -> Tensor:
        """See `RowSource`."""
        return as_gradient(table, rows, values, sparse)


def as_gradient(table: Tensor, rows: Tensor, values: Tensor, sparse: bool) -> Tensor:
    """Gradients of different rows as a sparse tensor or one of the table's shape."""
    values = values.to(table.device, table.dtype)
    if sparse:
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), values, table.shape, is_coalesced=True, check_invariants=False
        )
    return torch.zeros_like(table).index_copy_(0, rows, values)


@dataclass
class Fetched:
    """Rows at hand: which ones (rising) and their values, on the device that asked for them."""

    rows: Tensor
    values: Tensor
    home: Tensor
    """`rows` on the table's device."""
    ready: Any = None  # torch.Event
    """When a copy that is still under way has arrived."""

    def wait(self) -> "Fetched":
        """Let the current stream of the device wait for the copy."""
        if self.ready is not None:
            stream = torch.accelerator.current_stream(self.values.device)
            stream.wait_event(self.ready)
            for tensor in (self.rows, self.values):
                tensor.record_stream(stream)
            self.ready = None
        return self

    def read(self, addresses: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        """Rows at `addresses` [B, S, H] from `values` [U, W], which are or follow from this object's: [B, S, H, W].

        A row that was not fetched is an error, not zeros: answers would depend on what happened to be at hand.
        """
        index = torch.searchsorted(self.rows, addresses).clamp_(max=self.rows.shape[0] - 1)
        found = self.rows[index] == addresses
        if valid is not None:
            found = found | ~valid.unsqueeze(-1)
        out = F.embedding(index, values)
        if addresses.device.type == "cpu":
            assert bool(found.all()), "a row was needed that the fetch did not ask for"
            return out
        return out.masked_fill(~found.unsqueeze(-1), float("nan"))  # no wait for the device; the loss will tell


@cache
def _thread() -> ThreadPoolExecutor:
    """One thread for all fetches: they stay in order, which exchanges between processes rely on."""
    return ThreadPoolExecutor(1, thread_name_prefix="rorqual-engram")


def fetch_ahead(
    table: nn.Parameter, source: RowSource, asked: Sequence[Tensor], device: torch.device
) -> "Future[Fetched]":
    """Start fetching the rows at the addresses `asked`, for use on `device`."""
    return _thread().submit(fetch, table, source, asked, device)


@torch.no_grad()
def fetch(table: nn.Parameter, source: RowSource, asked: Sequence[Tensor], device: torch.device) -> Fetched:
    """As `fetch_ahead`, but now, and returning what it fetched."""
    none = torch.zeros(0, dtype=torch.int64, device=table.device)
    rows = torch.unique(torch.cat([none, *(addresses.to(table.device).flatten() for addresses in asked)]))
    values = source.fetch(table, rows)
    if table.device == device:
        return Fetched(rows, values, rows)
    with torch.Stream(device):
        there = [staged(tensor).to(device, non_blocking=True) for tensor in (rows, values)]
        ready = torch.accelerator.current_stream(device).record_event()
    return Fetched(there[0], there[1], rows, ready)


class Link(torch.autograd.Function):
    """Fetched values as a function of the table, so that their gradient finds the way to it."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, fetched: Fetched, source: RowSource, sparse: bool) -> Tensor:
        ctx.save_for_backward(table)
        ctx.args = fetched.home, source, sparse
        return fetched.values.view_as(fetched.values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows, source, sparse = ctx.args
        (table,) = ctx.saved_tensors
        return source.gradient(table, rows, grads[0], sparse), None, None, None
