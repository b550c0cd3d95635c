"""Activation checkpointing: what the backward pass needs is computed again instead of kept.

    mhc     Kept per sublayer: its output and everything inside it (attention's queries, keys and log-sum-exp, the
            experts' products, indices). Computed again: residual streams, collapsed inputs, norms and coefficients of
            the mix, which is most of the memory and little of the work. Every L_r = sqrt(n L / (n + 2)) layers the
            streams themselves are kept, which balances those kept against those of one group computed again.
    block   Kept per block: its input, the experts that routers chose and the entries that indexers picked. The block
            is computed again, with those choices, so rounding cannot flip one.

Gradients are those of keeping everything, bit for bit. Pipeline stages begin with streams of their own, so groups never
cross a border. Source: mHC paper, section on recomputation; V4 report, tensor-level activation checkpointing.

N streams, L layers.
"""

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from rorqual.config import ModelConfig
from rorqual.model import Trace, Transformer
from rorqual.model.block import Block, RunBlock
from rorqual.model.hyper_connections import HyperConnection

Mode = Literal["none", "mhc", "block"]


def install(model: Transformer, mode: Mode) -> None:
    """Make training passes of `model` keep less (or, with `none`, everything again)."""
    model.runner = recompute_blocks if mode == "block" else None
    if mode != "mhc":
        return
    for block in model.modules():
        if isinstance(block, Block) and not isinstance(block.hc, _Watched):
            block.hc = _Watched(block.hc)
            for norm in (block.attn_norm, block.ffn_norm):
                norm.register_forward_hook(_watch_norm)
    model.runner = partial(recompute_streams, layers_a_group(model.cfg))


def layers_a_group(cfg: ModelConfig) -> int:
    """L_r, the layers between two kept streams."""
    return max(1, round(math.sqrt(cfg.hc_mult * cfg.num_hidden_layers / (cfg.hc_mult + 2))))


def recompute_streams(
    interval: int, blocks: Sequence[Block], streams: Tensor, run: RunBlock, trace: Trace | None
) -> Tensor:
    """A `Runner` that keeps the streams of every `interval`-th block only; needs the watchers of `install`."""
    for start in range(0, len(blocks), interval):
        tape = _Tape(streams.device.type)
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, tape.unpack):
            before = _tape.set(tape)
            try:
                for block in blocks[start : start + interval]:
                    streams = run(block, streams, trace)
            finally:
                _tape.reset(before)
        tape.recent.clear()
    return streams


_tape: "ContextVar[_Tape | None]" = ContextVar("tape", default=None)
"""Where the blocks that run now write down their sublayers."""


class _Watched(HyperConnection):
    """A residual mix that tells the tape what goes through it."""

    def __init__(self, inner: HyperConnection) -> None:
        self.__dict__.update(inner.__dict__)
        self.inner = inner

    def pre(self, streams: Tensor, fn: Any, base: Any, scale: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tape = _tape.get()
        if tape is None:
            return self.inner.pre(streams, fn, base, scale)
        tape.begin(_Sublayer(self.inner, (fn, base, scale)), streams)
        x, post, comb = self.inner.pre(streams, fn, base, scale)
        tape.note({"x": x, "post": post, "comb": comb})
        return x, post, comb

    def post(self, streams: Tensor, y: Tensor, post: Tensor | None, comb: Tensor | None) -> Tensor:
        out = self.inner.post(streams, y, post, comb)
        tape = _tape.get()
        if tape is not None:
            tape.sublayers[-1].y = y.detach()
            tape.note({"out": out})
        return out


def _watch_norm(norm: nn.Module, _: Any, normed: Tensor) -> None:
    tape = _tape.get()
    if tape is not None:
        tape.sublayers[-1].norm = norm
        tape.note({"normed": normed})


@dataclass
class _Sublayer:
    """What it takes to compute a sublayer's surroundings again."""

    hc: HyperConnection
    parameters: tuple[Any, Any, Any]
    norm: nn.Module | None = None
    y: Tensor | None = None
    """The sublayer's output."""
    start: Tensor | None = None
    """The streams it reads, where they are not the output of the sublayer before it on this tape."""


@dataclass(frozen=True)
class _Place:
    """Which recomputed tensor a saved one is, and which view of it."""

    sublayer: int
    kind: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class _Tape:
    """The sublayers of some consecutive blocks: what autograd saves of the tensors around them is replaced by a place
    on this tape, and computed when the backward pass asks. That pass goes from the last sublayer to the first, so what
    lies behind it is dropped.
    """

    def __init__(self, device_type: str) -> None:
        self.sublayers: list[_Sublayer] = []
        self.recent: list[tuple[int, str, Tensor]] = []
        """Tensors of the current sublayer (sublayer, kind, tensor), of which casts may be saved."""
        self._places: dict[StorageWeakRef, tuple[int, str] | None] = {}
        """By storage. A weak reference keeps the storage's identity from being used again, not its memory."""
        self._values: list[dict[str, Tensor]] = []
        self._device_type = device_type
        self._autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def begin(self, sublayer: _Sublayer, streams: Tensor) -> None:
        """A sublayer that reads `streams`."""
        number = len(self.sublayers)
        if self._places.get(StorageWeakRef(streams.untyped_storage())) != (number - 1, "out"):
            sublayer.start = streams.detach()
            self._places[StorageWeakRef(streams.untyped_storage())] = None
        self.recent = [part for part in self.recent if part[1] == "out"]
        self.sublayers.append(sublayer)

    def note(self, tensors: dict[str, Tensor | None]) -> None:
        """Tensors of the current sublayer that can be computed again."""
        number = len(self.sublayers) - 1
        for kind, tensor in tensors.items():
            if tensor is not None:
                self._places.setdefault(StorageWeakRef(tensor.untyped_storage()), (number, kind))
                self.recent.append((number, kind, tensor.detach()))

    def pack(self, tensor: Tensor) -> Tensor | _Place:
        """What to keep of a tensor that autograd saves."""
        found = self._places.get(StorageWeakRef(tensor.untyped_storage()))
        if found is None:
            found = self._cast_of(tensor)
        if found is None:
            return tensor
        return _Place(*found, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _cast_of(self, tensor: Tensor) -> tuple[int, str] | None:
        """The recent tensor that `tensor` is in another precision. Operations make such copies of their inputs (fp32
        ones in a bf16 model, bf16 ones under autocast) without telling, so values are compared.
        """
        for number, kind, original in self.recent:
            if (
                original.dtype != tensor.dtype
                and original.numel() == tensor.numel()
                and tensor.is_floating_point()
                and tensor.is_contiguous()
                and original.is_contiguous()
                and torch.equal(original.to(tensor.dtype).view(-1), tensor.view(-1))
            ):
                return number, kind
        return None

    def unpack(self, kept: Tensor | _Place) -> Tensor:
        """The tensor that was saved."""
        if isinstance(kept, Tensor):
            return kept
        if len(self._values) <= kept.sublayer or not self._values[kept.sublayer]:
            self._compute()
        for behind in self._values[kept.sublayer + 1 :]:
            behind.clear()
        value = self._values[kept.sublayer][kept.kind]
        return value.to(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)

    @torch.no_grad()
    def _compute(self) -> None:
        """All values of the tape, by the operations that made them."""
        self._values = []
        out = None
        with torch.autocast(self._device_type, dtype=self._autocast[1], enabled=self._autocast[0]):
            for i, sublayer in enumerate(self.sublayers):
                streams = out if sublayer.start is None else sublayer.start
                assert streams is not None and sublayer.y is not None and sublayer.norm is not None
                with torch.enable_grad():  # without, mHC adds in the order of inference, and bits would differ
                    mixed = sublayer.hc.pre(streams, *sublayer.parameters)
                x, post, comb = (None if value is None else value.detach() for value in mixed)
                assert x is not None
                values = {"x": x, "normed": sublayer.norm(x), "post": post, "comb": comb}
                if i + 1 < len(self.sublayers):
                    values["out"] = out = sublayer.hc.post(streams, sublayer.y, post, comb)
                self._values.append({kind: value for kind, value in values.items() if value is not None})


# -------------------------------------------------------------------- block


def recompute_blocks(blocks: Sequence[Block], streams: Tensor, run: RunBlock, trace: Trace | None) -> Tensor:
    """A `Runner` that keeps each block's input, routes and picks, and computes the rest again."""
    for block in blocks:
        streams = _recomputed(block, streams, run, Trace() if trace is None else trace)
    return streams


def _recomputed(block: Block, streams: Tensor, run: RunBlock, trace: Trace) -> Tensor:
    routes: dict[str, Tensor] = {}
    picks: dict[str, Tensor] = {}
    again = Trace(trace.dense, trace.index_loss, router=True, forced=routes, picks=picks)
    is_first = True

    def compute(streams: Tensor) -> Tensor:
        nonlocal is_first
        if not is_first:  # what it writes down was written down before
            return run(block, streams, replace(again, index_losses=[], index_recall=[], routers=[]))
        is_first = False
        record = replace(trace, router=True, router_ids=True, routers=[], picks=picks)
        out = run(block, streams, record)
        trace.composite, trace._probe = record.composite, record._probe
        for router in record.routers:
            assert router.experts is not None
            routes[router.name] = router.experts
            if trace.router:
                trace.routers.append(router if trace.router_ids else replace(router, experts=None))
        return out

    result: Tensor = checkpoint(compute, streams, use_reentrant=False, preserve_rng_state=False)
    return result
