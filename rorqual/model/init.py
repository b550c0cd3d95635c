"""Initial weights: a standard pre-norm residual network at step 0. The released models' own recipe is not public."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.seeds import derive

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer

DIAGONAL = 4.0
"""Static bias of the residual mix's diagonal: Sinkhorn turns it into about 0.95 of a stream staying in place."""


@torch.no_grad()
def init_weights(
    model: "Transformer", seed: int = 0, wholes: Mapping[str, tuple[tuple[int, ...], int]] | None = None
) -> None:
    """Draw every parameter of a `Transformer` from streams named by parameter, so that adding one shifts no other.

    `wholes` names parameters of which `model` has a part only: shape of the whole and first element (flattened) here.
    The part gets the values that the whole would have there.
    """
    cfg = model.cfg
    n = cfg.hc_mult
    std = cfg.initializer_range
    depth = math.sqrt(2 * cfg.num_hidden_layers)
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device="cpu").manual_seed(derive(seed, "init", name))
        leaf = name.rsplit(".", 1)[-1]
        if cfg.residual == "hc" and leaf.startswith("hc_"):
            _init_free(name, parameter, n)
        elif leaf.endswith("_base"):
            parameter.fill_(0.0)
            parameter[:n] = -math.log(n - 1) if n > 1 else 0.0  # sigmoid = 1/n: the mean of the streams
            if parameter.shape[0] > n:
                parameter[2 * n :].view(n, n).fill_diagonal_(DIAGONAL)
        elif leaf.startswith("hc_") and leaf.endswith("_scale"):
            parameter.fill_(0.01)
        elif leaf in ("attn_sink", "ape") or name.endswith(".engram.conv"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            shape, start = (wholes or {}).get(name, (tuple(parameter.shape), 0))
            values = torch.randn(shape, generator=generator).view(-1)[start : start + parameter.numel()] * std
            if ".wo_b." in name or name.endswith(("experts.w2", "shared_experts.w2.weight")):
                values /= depth
            parameter.copy_(values.view(parameter.shape))


def _init_free(name: str, parameter: Tensor, n: int) -> None:
    """Unconstrained hyper-connections start as their paper says: each sublayer reads one stream (in turn), writes to
    all and leaves them as they are; the dynamic part is zero behind gates of 0.01.
    """
    _, index, leaf = name.split(".")
    parameter.zero_()
    if leaf.endswith("_scale"):
        parameter.fill_(0.01)
    elif leaf.endswith("_base"):
        sublayer = 2 * int(index) + (leaf == "hc_ffn_base")
        parameter[sublayer % n] = 1.0
        parameter[n : 2 * n] = 1.0
        parameter[2 * n :].view(n, n).fill_diagonal_(1.0)
