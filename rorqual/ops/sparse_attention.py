"""Attention over a sliding window and compressed entries, with a sink; never a tensor of size T x T.

One vector per key is both key and value for all heads (single shared KV head). Scores of the window and of the visible
(or selected) entries share one softmax; a learned logit per head, the sink, takes part in it and has no value.
Source: V4 report section 2.3; checkpoint behaviour.

B batch, T query tokens, H heads, K head width, W window, P past keys, C entries, G blocks of queries.
Queries are taken in blocks of W: a block reads one slice of 2W - 1 window keys, so work and memory are linear in T.
The backward pass recomputes scores block by block from the saved log-sum-exp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import registry, triton
from rorqual.ops.cache_codec import PackedEntries
from rorqual.ops.native import fused, inference, infers, usable_typed

BLOCK_BUDGET = 1 << 23
"""Largest score tensor built at a time, in elements (32 MiB in fp32)."""


@dataclass(frozen=True)
class Visible:
    """Which entries a query may use.

    `end` int64 [B or 1, T]: entries below it are visible; `start` likewise (0 when None). With `picks`
    int64 [B, T, k] only those (-1 marks an empty place) are used instead. `everything` promises that all are visible.
    """

    end: Tensor
    start: Tensor | None = None
    picks: Tensor | None = None
    everything: bool = False

    def by_row(self, batch: int) -> tuple[list[Tensor | None], list[Tensor]]:
        """`start` and `end` of each of `batch` rows, [T] each."""
        start = [None] * batch if self.start is None else [*self.start.expand(batch, -1)]
        return start, [*self.end.expand(batch, -1)]

    def mask(self, lo: int, hi: int, num_entries: int) -> Tensor | None:
        """Allowed entries of queries lo..hi as bool [B or 1, hi - lo, C], or None when all are."""
        if self.everything:
            return None
        index = torch.arange(num_entries, device=self.end.device)
        allowed = index < self.end[:, lo:hi, None]
        if self.start is not None:
            allowed &= index >= self.start[:, lo:hi, None]
        if self.picks is not None:
            picks = self.picks[:, lo:hi]
            chosen = torch.zeros((*picks.shape[:2], num_entries + 1), dtype=torch.bool, device=picks.device)
            chosen.scatter_(-1, picks % (num_entries + 1), True)  # -1 lands in the extra last place
            allowed = chosen[..., :num_entries] & allowed
        return allowed


def attention_reference(
    q: Tensor, kv: Tensor, sink: Tensor, positions: Tensor, window: int, scale: float,
    entries: Tensor | None = None, visible: Visible | None = None,
) -> Tensor:  # fmt: skip
    """The equation, with full T x (P + T + C) scores: for tests and reading only.

    Shapes: q [B, T, H, K]; kv [B, P + T, K] (P = window - 1 keys before the first query); sink [H]; positions
    [B or 1, T] (place within the sequence or document: how many earlier keys exist); entries [B, C, K] -> [B, T, H, K].
    """
    b, t, _, k = q.shape
    past = kv.shape[1] - t
    q, keys = q.float(), kv.float()
    distance = torch.arange(t, device=q.device)[:, None] + past - torch.arange(past + t, device=q.device)
    allowed = (distance >= 0) & (distance < window) & (distance <= positions[..., None])
    allowed = allowed.expand(b, -1, -1)
    if entries is not None and visible is not None:
        mask = visible.mask(0, t, entries.shape[1])
        extra = torch.ones(b, t, entries.shape[1], dtype=torch.bool, device=q.device) if mask is None else mask
        keys = torch.cat([keys, entries.float()], 1)
        allowed = torch.cat([allowed, extra.expand(b, -1, -1)], -1)
    scores = torch.einsum("bthk,bsk->bths", q, keys) * scale
    scores = scores.masked_fill(~allowed.unsqueeze(2), float("-inf"))
    with_sink = torch.cat([scores, sink.float().view(1, 1, -1, 1).expand(b, t, -1, 1)], -1)
    return torch.einsum("bths,bsk->bthk", with_sink.softmax(-1)[..., :-1], keys)


@dataclass
class _Plan:
    """The fixed facts of one call."""

    window: int
    scale: float
    positions: Tensor
    visible: Visible | None
    block: int
    gather: bool

    def groups(self, q: Tensor, num_entries: int) -> Iterator[tuple[int, int]]:
        """Ranges of queries (whole blocks) whose scores fit the budget."""
        b, t, h, k = q.shape
        width = self.block + self.window - 1
        if self.gather:
            assert self.visible is not None and self.visible.picks is not None
            width += self.visible.picks.shape[-1] * (1 + k // h)
        else:
            width += num_entries
        step = max(1, BLOCK_BUDGET // (b * h * width * self.block)) * self.block
        for lo in range(0, t, step):
            yield lo, min(t, lo + step)

    def window_mask(self, lo: int, hi: int, padded: int) -> Tensor:
        """0 where a query may see a window key, -inf elsewhere: fp32 [B or 1, G, block, 1, block + W - 1]."""
        device = self.positions.device
        row = torch.arange(self.block, device=device)[:, None]
        distance = row + self.window - 1 - torch.arange(self.block + self.window - 1, device=device)
        positions = F.pad(self.positions[:, lo:hi], (0, padded)).unflatten(1, (-1, self.block))
        allowed = (distance >= 0) & (distance < self.window) & (distance <= positions[..., None])
        return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, float("-inf")).unsqueeze(3)


@dataclass
class _Group:
    """Scores of some queries. `keys` [B, G, block + W - 1, K]; `chosen` is [B, C, K] or, gathered, [B, t, k, K]."""

    q: Tensor
    keys: Tensor
    window_scores: Tensor
    chosen: Tensor | None
    entry_scores: Tensor | None


def _scores(plan: _Plan, q: Tensor, kv: Tensor, entries: Tensor | None, lo: int, hi: int) -> _Group:
    """Window scores [B, G, block, H, block + W - 1] and entry scores [B, t, H, C or k], masked, fp32."""
    b, _, h, k = q.shape
    block, window = plan.block, plan.window
    padded = -(hi - lo) % block
    qs = q[:, lo:hi].float()
    if padded:
        qs = F.pad(qs, (0, 0, 0, 0, 0, padded))
    num_blocks = (hi - lo + padded) // block
    keys = kv[:, lo : hi + window - 1].float()
    if padded:
        keys = F.pad(keys, (0, 0, 0, padded))
    keys = keys.unfold(1, block + window - 1, block)  # [B, G, K, block + W - 1], a view
    blocks = qs.view(b, num_blocks, block * h, k)
    window_scores = (blocks @ keys).mul_(plan.scale).view(b, num_blocks, block, h, -1)
    window_scores += plan.window_mask(lo, hi, padded)
    qs = qs[:, : hi - lo]
    keys = keys.transpose(-1, -2)
    if entries is None or plan.visible is None:
        return _Group(qs, keys, window_scores, None, None)
    if plan.gather:
        picks = plan.visible.picks[:, lo:hi]  # type: ignore[index]
        rows = torch.arange(b, device=q.device)[:, None, None]
        chosen = entries.float()[rows, picks.clamp_min(0)]
        entry_scores = (qs @ chosen.transpose(-1, -2)).mul_(plan.scale)
        entry_scores.masked_fill_((picks < 0).unsqueeze(2), float("-inf"))
        return _Group(qs, keys, window_scores, chosen, entry_scores)
    chosen = entries.float()
    entry_scores = (qs.reshape(b, -1, k) @ chosen.transpose(-1, -2)).mul_(plan.scale).view(b, hi - lo, h, -1)
    mask = plan.visible.mask(lo, hi, entries.shape[1])
    if mask is not None:
        entry_scores.masked_fill_(~mask.unsqueeze(2), float("-inf"))
    return _Group(qs, keys, window_scores, chosen, entry_scores)


def _unblock(x: Tensor, count: int) -> Tensor:
    """[B, G, block, ...] -> [B, count, ...]: drop the padding of the last block."""
    return x.flatten(1, 2)[:, :count]


def _block(x: Tensor, block: int) -> Tensor:
    """[B, t, ...] -> [B, G, block, ...], zero-padded at the end."""
    padded = -x.shape[1] % block
    if padded:
        x = torch.cat([x, x.new_zeros(x.shape[0], padded, *x.shape[2:])], 1)
    return x.unflatten(1, (-1, block))


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, entries: Tensor | None, sink: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        b, t, h, k = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(b, t, h, dtype=torch.float32, device=q.device)
        sink_logit = sink.float()
        for lo, hi in plan.groups(q, 0 if entries is None else entries.shape[1]):
            g = _scores(plan, q, kv, entries, lo, hi)
            top = _unblock(g.window_scores.amax(-1), hi - lo)
            if g.entry_scores is not None and g.entry_scores.shape[-1]:
                top = torch.maximum(top, g.entry_scores.amax(-1))
            weights = g.window_scores.sub_(_block(top, plan.block).unsqueeze(-1)).exp_()
            total = _unblock(weights.sum(-1), hi - lo) + (sink_logit - top).exp()
            value = _unblock((weights.flatten(2, 3) @ g.keys).view(b, -1, plan.block, h, k), hi - lo)
            if g.entry_scores is not None and g.chosen is not None:
                weights = g.entry_scores.sub_(top.unsqueeze(-1)).exp_()
                total += weights.sum(-1)
                if plan.gather:
                    value = value + weights @ g.chosen
                else:
                    value = value + (weights.flatten(1, 2) @ g.chosen).view(value.shape)
            out[:, lo:hi] = value / total.unsqueeze(-1)
            lse[:, lo:hi] = total.log() + top
        ctx.save_for_backward(q, kv, entries, sink, out, lse)
        ctx.plan = plan
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, kv, entries, sink, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        b, t, h, k = q.shape
        window, block, scale = plan.window, plan.block, plan.scale
        dq = torch.empty_like(q)
        dkv = torch.zeros(b, kv.shape[1] + block, k, dtype=torch.float32, device=q.device)  # room for the last padding
        dentries = None if entries is None else torch.zeros(entries.shape, dtype=torch.float32, device=q.device)
        delta_all = (grads[0].float() * out.float()).sum(-1)
        dsink = -((sink.float() - lse).exp() * delta_all).sum((0, 1)).to(sink.dtype)
        for lo, hi in plan.groups(q, 0 if entries is None else entries.shape[1]):
            g = _scores(plan, q, kv, entries, lo, hi)
            do, delta, norm = grads[0][:, lo:hi].float(), delta_all[:, lo:hi], lse[:, lo:hi]
            p = g.window_scores.sub_(_block(norm, block).unsqueeze(-1)).exp_().flatten(2, 3)  # [B, G, block*H, 2W-1]
            do_blocks, q_blocks = _block(do, block).flatten(2, 3), _block(g.q, block).flatten(2, 3)
            ds = (do_blocks @ g.keys.transpose(-1, -2)).sub_(_block(delta, block).flatten(2, 3).unsqueeze(-1))
            ds.mul_(p).mul_(scale)
            dqs = _unblock((ds @ g.keys).view(b, -1, block, h, k), hi - lo)
            dkeys = ds.transpose(-1, -2) @ q_blocks
            dkeys += p.transpose(-1, -2) @ do_blocks
            num_blocks = dkeys.shape[1]
            span = num_blocks * block
            dkv[:, lo : lo + span] += dkeys[:, :, :block].reshape(b, span, k)
            for i in range(block, block + window - 1, block):  # what reaches into the following blocks
                part = dkeys[:, :, i : i + block]
                if part.shape[2] < block and num_blocks > 1:
                    part = F.pad(part, (0, 0, 0, block - part.shape[2]))
                width = min(part.shape[2] * num_blocks, dkv.shape[1] - lo - i)
                dkv[:, lo + i : lo + i + width] += part.reshape(b, -1, k)[:, :width]
            if g.entry_scores is not None and g.chosen is not None and dentries is not None:
                p = g.entry_scores.sub_(norm.unsqueeze(-1)).exp_()
                if plan.gather:
                    ds = (do @ g.chosen.transpose(-1, -2)).sub_(delta.unsqueeze(-1)).mul_(p).mul_(scale)
                    dqs = dqs + ds @ g.chosen
                    dchosen = ds.transpose(-1, -2) @ g.q
                    dchosen += p.transpose(-1, -2) @ do
                    picks = plan.visible.picks[:, lo:hi]  # type: ignore[union-attr, index]
                    dchosen.masked_fill_((picks < 0).unsqueeze(-1), 0)
                    flat = picks.clamp_min(0) + torch.arange(b, device=q.device)[:, None, None] * entries.shape[1]
                    dentries.view(-1, k).index_add_(0, flat.flatten(), dchosen.view(-1, k))
                else:
                    ds = (do.reshape(b, -1, k) @ g.chosen.transpose(-1, -2)).view(p.shape)
                    ds.sub_(delta.unsqueeze(-1)).mul_(p).mul_(scale)
                    dqs = dqs + (ds.flatten(1, 2) @ g.chosen).view(dqs.shape)
                    dentries.baddbmm_(ds.flatten(1, 2).transpose(-1, -2), g.q.reshape(b, -1, k))
                    dentries.baddbmm_(p.flatten(1, 2).transpose(-1, -2), do.reshape(b, -1, k))
            dq[:, lo:hi] = dqs
        dentries = None if dentries is None or entries is None else dentries.to(entries.dtype)
        return dq, dkv[:, : kv.shape[1]].to(kv.dtype), dentries, dsink, None


_attend_triton = triton.later("attention", "attend")

LANES = 16
"""The native kernel's vectors are whole ones of this many floats."""

GATHER_FROM = 8
"""Picks are gathered when there are more than this many entries per pick; below, masked GEMMs over all are faster."""


def sparse_attention(
    q: Tensor, kv: Tensor, sink: Tensor, positions: Tensor, window: int, scale: float,
    entries: Tensor | PackedEntries | None = None, visible: Visible | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_reference` in linear memory; also returns the log-sum-exp of each row's scores (no gradient).

    Shapes: q [B, T, H, K]; kv [B, W - 1 + T, K] (keys before the first query first; those a query must not see are
    hidden by `positions`); sink [H]; positions [B or 1, T]; entries [B, C, K] with `visible` -> out [B, T, H, K] in q's
    dtype, lse fp32 [B, T, H]. Scores and sums are fp32.
    """
    assert kv.shape[1] == window - 1 + q.shape[1]
    if entries is not None and not entries.shape[1]:
        entries = visible = None
    if isinstance(entries, PackedEntries):
        entries, visible = _unpacked(entries, visible)
    is_alike = q.dtype is kv.dtype and (entries is None or entries.dtype is q.dtype)
    start, end, picks = (visible.start, visible.end, visible.picks) if visible is not None else (None, None, None)
    if is_alike and infers(q):
        return inference.attend(q, kv, sink, positions, window, scale, entries, start, end, picks)
    if is_alike and registry.allows("triton") and triton.usable(q):
        return _attend_triton(q, kv, sink, positions, window, scale, entries, start, end, picks)
    if is_alike and q.shape[-1] % LANES == 0 and usable_typed(q):
        return fused.Attention.apply(q, kv, entries, sink, positions, start, end, picks, window, scale)
    gather = False
    if entries is not None and visible is not None and visible.picks is not None:
        gather = entries.shape[1] > GATHER_FROM * visible.picks.shape[-1]
    plan = _Plan(window, scale, positions, visible, min(window, q.shape[1]), gather)
    return _SparseAttention.apply(q, kv, entries, sink, plan)


def _unpacked(entries: PackedEntries, visible: Visible | None) -> tuple[Tensor, Visible | None]:
    """Packed entries as numbers: those that queries of one sequence picked, where they picked, or else all."""
    if visible is None or visible.picks is None or len(entries.rows) > 1:
        return entries.decode(), visible
    some, picks = entries.picked(visible.picks)
    return some, Visible(torch.full_like(visible.end, some.shape[1]), None, picks)


def entry_mass(
    q: Tensor, lse: Tensor, entries: Tensor, allowed: Tensor | None, scale: float, picks: Tensor | None = None
) -> Tensor:
    """Attention probability on each entry, summed over heads: the indexer's target before normalisation.

    Shapes: q [B, t, H, K], lse [B, t, H], entries [B, C, K], allowed bool [B or 1, t, C] or None -> [B, t, C]. With
    `picks` [B, t, k] only those entries are looked at: -> [B, t, k], 0 at empty places.
    """
    b, t, h, k = q.shape
    q = q.float()
    if picks is None:
        scores = (q.reshape(b, -1, k) @ entries.float().transpose(-1, -2)).view(b, t, h, -1) * scale
        mass = (scores - lse.unsqueeze(-1)).exp().sum(2)
        return mass if allowed is None else mass.masked_fill(~allowed, 0)
    rows = torch.arange(b, device=q.device)[:, None, None]
    chosen = entries.float()[rows, picks.clamp_min(0)]
    mass = ((q @ chosen.transpose(-1, -2)) * scale - lse.unsqueeze(-1)).exp().sum(2)
    return mass.masked_fill(picks < 0, 0)
