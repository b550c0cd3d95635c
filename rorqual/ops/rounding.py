"""The roundings that V4's released weights expect inside attention, with straight-through gradients.

Source: V4 report (quantisation-aware training of KV entries and of the indexer's query-key path).
Numerics in `ops/quant.py`.
"""

import math

import torch
from torch import Tensor

from rorqual.ops.quant import FP4_GROUP, round_act_fp4, round_act_fp8

KV_GROUP = 64


def round_kv_fp8(kv: Tensor, nope_dim: int) -> Tensor:
    """FP8 round trip of the channels without rope, the first `nope_dim`, in groups of 64: [..., K] -> [..., K].

    Narrow heads take the largest group that divides them.
    """
    rounded = kv.detach().clone()
    if nope_dim:
        rounded[..., :nope_dim] = round_act_fp8(rounded[..., :nope_dim], math.gcd(nope_dim, KV_GROUP))
    return kv + (rounded - kv).detach()


def round_entry_fp8(entry: Tensor, nope_dim: int) -> Tensor:
    """What an entry's row in an FP8 cache holds: `round_kv_fp8`, and the channels with rope in bf16."""
    rounded = round_kv_fp8(entry, nope_dim)
    if entry.dtype == torch.bfloat16:
        return rounded
    rope = entry[..., nope_dim:]
    return torch.cat([rounded[..., :nope_dim], rope + (rope.detach().bfloat16().to(rope.dtype) - rope.detach())], -1)


def round_index_fp4(x: Tensor) -> Tensor:
    """FP4 round trip of all channels of index queries and keys, in groups of 32: [..., K] -> [..., K]."""
    return x + (round_act_fp4(x.detach(), math.gcd(x.shape[-1], FP4_GROUP)) - x).detach()
