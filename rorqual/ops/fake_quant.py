"""Quantisation as training sees it: values rounded to a storage format, gradients passed on unchanged.

Source: V4 report (quantisation-aware training). The fp32 master weight is rounded to FP4 or FP8 with scales taken as
constants, the product uses the rounded values, and the gradient with respect to them goes to the master as it is
(straight-through). FP4 runs on FP8 hardware by a recast that loses nothing (`quant.recast_fp4_to_fp8`), so the rounded
value is the same on either path and only it is computed here. Formats and scale rules: `ops/quant.py`.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.ops import quant

WeightFormat = Literal["fp4", "fp8", "bf16"]
"""How a weight is stored: FP4 with 1 x 32 scales, FP8 with 128 x 128 scales, or bf16."""

PIECE_ELEMENTS = 1 << 17
"""Elements rounded at once on a CPU: temporaries that stay in its cache are several times faster than large ones."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The values of `rounded`, bit for bit; the gradient goes to `exact` as if nothing had been rounded."""
    if not (torch.is_grad_enabled() and exact.requires_grad):
        return rounded
    result: Tensor = _StraightThrough.apply(exact, rounded)
    return result


@torch.no_grad()
def rounded_weight(weight: Tensor, kind: WeightFormat) -> Tensor:
    """What `weight` [..., out, in] (bf16: any shape) is once stored in `kind` and read back; its dtype stays."""
    if kind == "bf16":
        return weight.bfloat16().to(weight.dtype)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rounded = _rounded_fp4 if kind == "fp4" else _rounded_fp8
    for source, target in zip(_pieces(weight), _pieces(result), strict=True):
        target.copy_(rounded(source))
    return result


def _pieces(weight: Tensor) -> list[Tensor]:
    """Views [matrices, rows, in] that fit a cache on a CPU: several whole matrices, or some 128-row blocks of one."""
    matrices = weight.reshape(-1, *weight.shape[-2:])
    if weight.device.type != "cpu":
        return [matrices]
    together = PIECE_ELEMENTS // matrices[0].numel()
    if together:
        return list(matrices.split(together))
    rows = max(1, PIECE_ELEMENTS // (quant.FP8_BLOCK[0] * weight.shape[-1])) * quant.FP8_BLOCK[0]
    return [piece for matrix in matrices.split(1) for piece in matrix.split(rows, dim=1)]


def _rounded_fp4(weight: Tensor) -> Tensor:
    scale = quant.fp4_weight_scale(weight)[..., None]
    values = quant.round_e2m1(quant.split_groups(weight, quant.FP4_GROUP) / scale).mul_(scale)
    return values.flatten(-2)[..., : weight.shape[-1]]


def _rounded_fp8(weight: Tensor) -> Tensor:
    blocks = quant.split_blocks(weight)
    scale = quant.fp8_scale(blocks.abs().amax(dim=(-3, -1)))[..., :, None, :, None]
    codes = (blocks / scale).clamp_(-quant.FP8_MAX, quant.FP8_MAX).to(torch.float8_e4m3fn)
    return quant.join_blocks(codes.float().mul_(scale), weight.shape[-2:])


def fake_fp4_weight(weight: Tensor) -> Tensor:
    """MXFP4 round trip of weights [..., out, in], one scale per row and 32 input channels, straight through."""
    return straight_through(weight, rounded_weight(weight, "fp4"))


def fake_fp8_weight(weight: Tensor) -> Tensor:
    """FP8 round trip of weights [..., out, in], one scale per 128 x 128 block (edges ragged), straight through."""
    return straight_through(weight, rounded_weight(weight, "fp8"))


def fake_fp8_input(x: Tensor, group: int = 128) -> Tensor:
    """FP8 round trip of a product's input [..., C], one scale per `group` channels of a row, straight through."""
    return straight_through(x, quant.round_act_fp8(x.detach(), group))
