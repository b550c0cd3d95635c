"""Engram: a memory of token runs. What the last few ids hash to is looked up in a large table, and a gate decides per
residual stream how much of it is added before the block's attention.

    e = rows of the last n ids, side by side (ngram_hash.py)
    k^s = W_K^s e,  v = W_V e                                one product; keys per stream s, the value is shared
    u^s = gate(h^s, k^s) v                                   ops/engram_gate.py
    h^s <- h^s + SiLU(conv(RMSNorm(u^s))) + u^s              `paper`: causal depthwise, starts at zero
    h^s <- h^s + u^s                                         `v41`

Neither hashes nor convolution reach across the beginning of a document. Training, prefill, chunks and decoding all come
through `Engram.forward`. Source: Engram paper, section 2; V4.1-Flash report for `v41`. Left out: V4.1's FP8 rows.

B batch, S tokens, N streams, D hidden, H tables, W channels of a row.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model.engram_rows import SPARSE_ABOVE, Fetched, Link, LocalRows, RowSource, fetch, fetch_ahead
from rorqual.model.layer_state import Recall
from rorqual.model.layout import Layout
from rorqual.model.linear import Linear
from rorqual.model.ngram_hash import NgramHash
from rorqual.model.ring import ring_read, ring_write
from rorqual.model.trace import Trace
from rorqual.ops.engram_gate import engram_gate
from rorqual.ops.pointwise import silu

CONV_EPS = 1e-5
V41_EPS = 1e-20


class Engram(nn.Module):
    """The memory of one block: hash constants, table, projections, norms and convolution.

    `table` [R, W] holds all tables of the layer one below the other. With placement `host` it stays in main memory
    wherever the module is moved.
    """

    def __init__(self, cfg: ModelConfig, spec: LayerSpec, name: str) -> None:
        super().__init__()
        assert cfg.engram is not None
        self.settings, self.name = cfg.engram, name
        self.streams, self.hidden = cfg.hc_mult, cfg.hidden_size
        channels = self.streams * self.hidden
        self.eps = V41_EPS if self.settings.flavour == "v41" else cfg.rms_norm_eps
        self.hash = NgramHash(self.settings, spec.index, cfg.vocab_size)
        self.table = nn.Parameter(torch.empty(self.hash.num_rows, self.settings.head_dim))
        self.proj = Linear(self.settings.width, channels + self.hidden)
        """Keys of all streams, then the value."""
        self.h_norm = nn.Parameter(torch.empty(channels))
        self.k_norm = nn.Parameter(torch.empty(channels))
        if self.settings.reach:
            self.conv_norm = nn.Parameter(torch.empty(channels))
            self.conv = nn.Parameter(torch.empty(channels, self.settings.kernel))
        self.source: RowSource = LocalRows()
        self.is_sparse = self.hash.num_rows > SPARSE_ABOVE
        """Whether the table's gradient is sparse; its optimizer then updates only the rows in it."""
        self.is_off = False
        """Leave the streams as they are (to measure what the memory is worth)."""
        self._step: Future[Fetched] | None = None  # rows of a whole training step, announced beforehand
        self._call: Future[Fetched] | None = None  # rows of the next call

    @property
    def is_remote(self) -> bool:
        """Whether rows must be fetched from elsewhere."""
        return self.settings.placement == "host" or self.is_spread

    @property
    def is_spread(self) -> bool:
        """Whether other processes hold rows of the table, so that all must make the same calls."""
        return not isinstance(self.source, LocalRows)

    @property
    def is_announced(self) -> bool:
        """Whether training announces a step's rows; a small table beside the weights is simply read."""
        return (self.is_remote or self.is_sparse) and not self.is_off

    def forward(
        self,
        streams: Tensor,
        tokens: Tensor,
        layout: Layout,
        recall: Recall | Sequence[Recall] | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Streams [B, S, N, D] and raw token ids [B, S] -> streams with what was read added."""
        if self.is_off:
            return streams
        e = self._read(self._addresses(tokens, layout, recall), layout).flatten(-2)
        if layout.valid is not None:  # padding reads nothing, wherever rows come from
            e = e.masked_fill(~layout.valid.unsqueeze(-1), 0.0)
        mixed = self.proj(e if e.dtype == streams.dtype else e.to(streams.dtype)).float()
        keys, value = mixed.split([self.streams * self.hidden, self.hidden], -1)
        keys = keys.unflatten(-1, (self.streams, self.hidden))
        weight = (self.h_norm.float() * self.k_norm.float()).view(self.streams, self.hidden)
        gate = engram_gate(streams, keys, weight, self.eps)
        gated = gate.unsqueeze(-1) * value.unsqueeze(-2)
        added = gated + self._convolve(gated, layout, recall) if self.settings.reach else gated
        if recall is not None:
            self._remember(self.hash.compress(tokens), value, gate, layout, recall)
        if trace is not None:
            trace.keep(f"{self.name}.gate", gate)
        return (streams.float() + added).to(streams.dtype)

    def _addresses(self, tokens: Tensor, layout: Layout, recall: Recall | Sequence[Recall] | None) -> Tensor:
        """Raw token ids [B, S] -> table rows [B, S, H]."""
        ids, count = self.hash.compress(tokens), self.settings.max_order - 1
        rows = []
        for part, (one, mine) in zip(layout.split(ids), layout.each(recall), strict=True):
            past = one.halo(part, count) if mine is None else ring_read(mine.ids, one, count)
            rows.append(self.hash(part, past, one))
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    @staticmethod
    def _remember(
        ids: Tensor, value: Tensor, gate: Tensor, layout: Layout, recall: Recall | Sequence[Recall] | None
    ) -> None:
        """Put compressed ids [B, S], values [B, S, D] and gates [B, S, N] of this call into the rings."""
        parts = zip(layout.split(ids), layout.split(value), layout.split(gate), layout.each(recall), strict=True)
        for its_ids, its_value, its_gate, (one, mine) in parts:
            ring_write(mine.ids, its_ids, one)
            if mine.value is not None and mine.gate is not None:
                ring_write(mine.value, its_value, one)
                ring_write(mine.gate, its_gate, one)

    def _convolve(self, gated: Tensor, layout: Layout, recall: Recall | Sequence[Recall] | None) -> Tensor:
        """SiLU of the dilated causal convolution over the normed gated values [B, S, N, D], fp32."""
        parts = zip(layout.split(self._normed(gated)), layout.each(recall), strict=True)
        out = [self._filter(x, one, mine) for x, (one, mine) in parts]
        return silu(out[0] if len(out) == 1 else torch.cat(out, 1))

    def _filter(self, x: Tensor, layout: Layout, recall: Recall | None) -> Tensor:
        """The convolution itself, over the normed gated values of the layout's sequences and what they follow."""
        reach, step = self.settings.reach, self.settings.max_order
        num_tokens = x.shape[1]
        if recall is None:
            past = layout.halo(x, reach)
        else:
            assert recall.value is not None and recall.gate is not None
            value, gate = (ring_read(ring, layout, reach).float() for ring in (recall.value, recall.gate))
            before = layout.positions[:, :1] + torch.arange(-reach, 0, device=x.device) < 0  # the text's beginning
            past = self._normed(gate.masked_fill(before.unsqueeze(-1), 0.0).unsqueeze(-1) * value.unsqueeze(-2))
        every = torch.cat([past, x], 1)
        taps = self.conv.float().view(self.streams, self.hidden, -1).unbind(-1)
        out = x * taps[-1]
        for back in range(1, self.settings.kernel):
            begin = reach - back * step
            shifted = every[:, begin : begin + num_tokens]
            if layout.packed:  # other documents lie before
                shifted = shifted.masked_fill((layout.positions < back * step)[..., None, None], 0.0)
            out = torch.addcmul(out, shifted, taps[-1 - back])
        return out

    def _normed(self, gated: Tensor) -> Tensor:
        return F.rms_norm(gated, gated.shape[-1:], None, CONV_EPS) * self.conv_norm.float().view(self.streams, -1)

    # ------------------------------------------------------------------ rows

    def _read(self, addresses: Tensor, layout: Layout) -> Tensor:
        """Table rows [B, S, H, W] at addresses [B, S, H], from what was fetched ahead where there is something."""
        learns = torch.is_grad_enabled() and self.table.requires_grad
        if self._step is not None:
            fetched = self._step.result().wait()
            return fetched.read(addresses, fetched.values.requires_grad_(), layout.valid)
        if not self.is_remote and not (learns and self.is_sparse):
            return F.embedding(addresses, self.table)
        ahead, self._call = self._call, None
        device, valid = addresses.device, layout.valid
        if ahead is not None:
            fetched = ahead.result()
        elif not self.is_spread:
            fetched = fetch(self.table, self.source, [_valid(addresses, valid)], device)
        else:  # exchanges between processes keep one order, that of the fetching thread
            fetched = fetch_ahead(self.table, self.source, [_valid(addresses, valid)], device).result()
        fetched.wait()
        values = fetched.values
        if learns:
            linked: Any = Link.apply(self.table, fetched, self.source, self.is_sparse)
            values = linked
        return fetched.read(addresses, values, valid)

    def prefetch(self, tokens: Tensor, layout: Layout, recall: Recall | Sequence[Recall] | None) -> None:
        """Start fetching the rows of the next call; the model does so before its first block."""
        if self.is_remote and self._step is None and not self.is_off:
            addresses = self._addresses(tokens, layout, recall)
            self._call = fetch_ahead(self.table, self.source, [_valid(addresses, layout.valid)], tokens.device)

    def announce(self, calls: Sequence[tuple[Tensor, Layout]]) -> None:
        """Start fetching the rows of a whole step: all its calls' tokens and layouts (without states).

        Until `collect` or `forget`, calls read these rows and add their gradients there.
        """
        asked = [_valid(self._addresses(tokens, layout, None), layout.valid) for tokens, layout in calls]
        self._step = fetch_ahead(self.table, self.source, asked, self.hash.compression.device)

    def collect(self) -> None:
        """After the step's backward passes: bring the announced rows' gradients to the table's own."""
        assert self._step is not None, "nothing was announced"
        fetched, self._step = self._step.result().wait(), None
        values = fetched.values
        gradient = torch.zeros_like(values) if values.grad is None else values.grad
        found = self.source.gradient(self.table, fetched.home, gradient, self.is_sparse)
        with torch.no_grad():
            self.table.grad = found if self.table.grad is None else self.table.grad + found

    def forget(self) -> None:
        """Drop what was announced or fetched ahead."""
        for future in (self._step, self._call):
            if future is not None:
                future.result()
        self._step = self._call = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Engram":
        """Move and cast as nn.Module does, except that a host table is cast but not moved."""
        if self.settings.placement != "host":
            return super()._apply(fn, recurse)
        self.forget()
        table = self.table
        self._parameters["table"] = None  # keeps its place among the parameters
        try:
            super()._apply(fn, recurse)
            probe = fn(table.data.new_empty(0))
            if not table.is_meta:
                table.data = table.data.to(probe.dtype)
            elif not probe.is_meta:
                table = nn.Parameter(torch.empty(table.shape, dtype=probe.dtype), table.requires_grad)
        finally:
            self._parameters["table"] = table
        return self


def _valid(addresses: Tensor, valid: Tensor | None) -> Tensor:
    """Addresses of tokens that are no padding (of everything where nothing else is left)."""
    if valid is None or not bool(valid.any()):
        return addresses
    return addresses[valid]


def memories(model: nn.Module) -> list[Engram]:
    """Every Engram module of a model, block by block."""
    return [module for module in model.modules() if isinstance(module, Engram)]


def install_compression(model: nn.Module, compression: Tensor) -> None:
    """Give every memory of a new model the compressed vocabulary of its tokenizer, [V] int64.

    With trained weights this would move every row. Raises: CheckpointError when it is not a map of the vocabulary.
    """
    for memory in memories(model):
        memory.hash.install(compression)
