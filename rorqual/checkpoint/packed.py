"""FP8 and FP4 tensors in files: which ones, their bytes and scales, and back to numbers.

    FP4    X.weight int8 [out, in/2], two values a byte, low nibble first; X.scale e8m0 [out, in/32]
    FP8    X.weight e4m3 [out, in]; X.scale e8m0 [ceil(out/128), ceil(in/128)] (FP32 for the base checkpoints' experts)

Everything else is bf16 or fp32, as in the released checkpoints. Values and scales come from the same functions that
training simulates with, so a written file holds what `model/quantised.py` computed with. Numerics: `ops/quant.py`.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.checkpoint.layout import FileTensor, Shape
from rorqual.checkpoint.names import split_expert
from rorqual.errors import ConfigError
from rorqual.model.quantised import ExpertFormat, StoredFormat, stored_format
from rorqual.ops import quant

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": list(quant.FP8_BLOCK),
}
"""`quantization_config` of the released models' config.json."""

FP4_DTYPES, FP8_DTYPES = ("I8", "U8"), ("F8_E4M3",)
SCALE_DTYPES = ("F8_E8M0", "U8", "F32")

_DTYPE = {"fp4": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}


class Stored(NamedTuple):
    """One tensor of a packed file."""

    tensor: FileTensor
    """Its name and stored shape; the parts are those of the weight, for a scale too."""
    dtype: torch.dtype
    kind: StoredFormat
    """Format of the weight that it is or belongs to."""
    is_scale: bool = False


def stored_tensors(tensors: list[FileTensor], state: Mapping[str, Tensor], experts: ExpertFormat) -> list[Stored]:
    """The tensors of a packed file of the model with `state`, of which `tensors` are the unpacked ones; with scales."""
    out: list[Stored] = []
    for tensor in tensors:
        kind = stored_format(tensor.name, experts)
        if not state[tensor.parts[0].ours].is_floating_point():
            out.append(Stored(tensor, torch.int64, "fp32"))
            continue
        if kind not in ("fp4", "fp8"):
            out.append(Stored(tensor, _DTYPE[kind], kind))
            continue
        shape = (tensor.shape[0], tensor.shape[1] // 2) if kind == "fp4" else tensor.shape
        out.append(Stored(FileTensor(tensor.name, shape, tensor.parts), _DTYPE[kind], kind))
        is_base = kind == "fp8" and split_expert(tensor.name) is not None
        dtype = torch.float32 if is_base else torch.float8_e8m0fnu
        scale = FileTensor(scale_name(tensor.name), scale_shape(tensor.shape, kind), tensor.parts)
        out.append(Stored(scale, dtype, kind, is_scale=True))
    return out


def scale_name(weight: str) -> str:
    """Name of the scales of the weight called `weight`."""
    return weight.removesuffix("weight") + "scale"


def scale_shape(shape: Shape, kind: StoredFormat) -> Shape:
    """Shape of the scales of a weight [..., out, in]."""
    rows, columns = (1, quant.FP4_GROUP) if kind == "fp4" else quant.FP8_BLOCK
    return (*shape[:-2], math.ceil(shape[-2] / rows), math.ceil(shape[-1] / columns))


def pack(weight: Tensor, kind: StoredFormat, known_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and e8m0 scales of a weight [out, in].

    `known_scale`: the scales of the file that the weight was read from. They are kept if they hold it exactly, so a
    file that is read and written comes back byte for byte (of several exact scales the rule picks the smallest).
    Raises: ConfigError for FP4 rows of odd length.
    """
    quantize = quant.quantize_weight_fp4 if kind == "fp4" else quant.quantize_weight_fp8
    if known_scale is not None and known_scale.shape == scale_shape(tuple(weight.shape), kind):
        codes, scale = quantize(weight, scale=known_scale)
        if torch.equal(unpack(codes, scale), weight.float()):
            return codes, scale
    return quantize(weight)


def unpack(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 [..., out, in] of FP4 bytes or FP8 codes and their scales (e8m0 or fp32).

    Raises: CheckpointError when the shapes do not fit each other.
    """
    if codes.dtype == torch.float8_e4m3fn:
        return quant.dequantize_weight_fp8(codes, scale)
    return quant.dequantize_weight_fp4(codes, scale)


def exponents(scale: Tensor) -> Tensor | None:
    """Stored scales as e8m0 bytes; None where they are no powers of two."""
    if scale.dtype != torch.float32:
        return scale.view(torch.float8_e8m0fnu)
    with contextlib.suppress(ConfigError):
        return quant.encode_e8m0(scale)
    return None


def describe(config: dict[str, Any], experts: ExpertFormat) -> dict[str, Any]:
    """config.json of a packed file: as the released ones, which name `expert_dtype` only for FP4."""
    return {**config, "quantization_config": QUANTIZATION} | ({"expert_dtype": "fp4"} if experts == "fp4" else {})
