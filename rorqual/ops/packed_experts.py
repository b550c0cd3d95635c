"""Routed experts for inference on weights kept as they are stored, FP4 above all.

`ops/experts.py` has the arithmetic; here w1, w3 and w2 are stacks in packed form and there are no gradients. A token's
result does not depend on the tokens beside it.

T tokens, D hidden, E experts, A active experts per token, I expert width.
"""

from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.ops import registry, triton
from rorqual.ops.experts import experts_reference
from rorqual.ops.matvec import code_arguments, works
from rorqual.ops.native.assignments import assign
from rorqual.ops.native.library import call
from rorqual.ops.packed_weight import FORMATS, PackedWeight


def packed_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, limit: float
) -> Tensor:
    """y = sum_a expert_{experts[a]}(x, weights[a]), experts in ascending order, accumulated in fp32.

    Shapes: x [T, D] (fp32 or bf16), experts int64 [T, A], weights [T, A], w1 and w3 [E, I, D], w2 [E, D, I] -> fp32
    [T, D]. Hidden values and each expert's output are rounded to x's dtype. limit 0: no clamp.
    Raises: ConfigError when the three stacks are not in one format.
    """
    if not w1.format == w3.format == w2.format:
        raise ConfigError(
            f"experts' w1, w3 and w2 are in {w1.format}, {w3.format} and {w2.format}, but one call reads one format. "
            "Pack all three alike."
        )
    if w1.format == "fp4" and experts.numel() and registry.allows("triton") and triton.usable(x):
        return _packed_experts_triton(x, experts, weights, w1, w3, w2, limit)
    return registry.pick("packed_experts", x)(x, experts, weights, w1, w3, w2, limit)


def packed_experts_reference(
    x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, limit: float
) -> Tensor:
    """See `packed_experts`: `experts_reference` with dequantised weights."""
    gate, up, down = (w.dequantise().to(x.dtype) for w in (w1, w3, w2))
    return experts_reference(x, experts, weights.float(), gate, up, down, limit)


def _packed_experts_native(
    x: Tensor, experts: Tensor, weights: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, limit: float
) -> Tensor:
    x = x.contiguous()
    num_experts, inner, d = w1.shape
    to = assign(experts, weights, num_experts)
    out = x.new_empty(experts.numel(), d)
    call(
        "packed_experts", x, to.token, to.bounds, to.gate,
        *code_arguments(w1), *code_arguments(w3), *code_arguments(w2), FORMATS.index(w1.format), len(experts),
        num_experts, d, inner, limit, None, out,
    )  # fmt: skip
    return to.combine(out)


_packed_experts_triton = triton.later("experts", "packed_experts")
registry.register("packed_experts", "reference", packed_experts_reference)
registry.register("packed_experts", "native", _packed_experts_native, works)
