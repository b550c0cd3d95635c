"""Quantised rows of the cache: compressed entries in FP8 with bf16 rope, index keys in FP4.

Source: V4 report (cache in FP8 and FP4); checkpoint behaviour. Numerics in `ops/quant.py`.

    entry row      [no-rope channels, e4m3] [rope channels, bf16] [e8m0 scale per 64 no-rope channels] [padding]
    index key row  [channels, e2m1, two a byte, low nibble first] [e8m0 scale per 32 channels] [padding]

Padding is zeros up to a multiple of 4 bytes. At V4 sizes (448 + 64, 128) a row has 584 and 68 bytes. Widths that 64 or
32 do not divide take the largest group that divides both, as `ops/rounding.py` does. What that module has rounded comes
back exactly (rope channels where they are bf16 numbers); other values are rounded on the way in. A group with a NaN or
an infinity comes back as NaN.

N no-rope channels, R rope channels, K index width, Y bytes of a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import CacheError, ConfigError
from rorqual.ops import registry
from rorqual.ops.native import load
from rorqual.ops.native.library import call
from rorqual.ops.quant import FP4_GROUP, decode_e8m0, dequantize_groups, encode_e8m0, pack_fp4, unpack_fp4
from rorqual.ops.quant import quantize_act_fp4 as fp4
from rorqual.ops.quant import quantize_act_fp8 as fp8
from rorqual.ops.rounding import KV_GROUP

ALIGNMENT = 4
"""Rows are padded to a multiple of this many bytes."""


@dataclass(frozen=True)
class PackedEntries:
    """Compressed entries as they lie in memory, and the dtype that they are computed with."""

    rows: Tensor
    """uint8 [B, C, Y]."""
    nope_dim: int
    rope_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the entries: [B, C, N + R]."""
        return torch.Size((*self.rows.shape[:-1], self.nope_dim + self.rope_dim))

    def decode(self) -> Tensor:
        """All of them, [B, C, N + R]."""
        return decode_entries(self.rows, self.nope_dim, self.rope_dim, self.dtype)

    def picked(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Only those that `picks` int64 [1, T, k] (-1: none) names: [1, U, N + R] in their order, and where the picks
        stand among them.
        """
        used, places = picks.unique(return_inverse=True)
        if used.numel() and used[0] < 0:
            used, places = used[1:], places - 1
        rows = self.rows[0].index_select(0, used)
        return decode_entries(rows, self.nope_dim, self.rope_dim, self.dtype).unsqueeze(0), places


def unpacked(entries: Tensor | PackedEntries) -> Tensor:
    """Entries [B, C, K], decoded if they are packed."""
    return entries.decode() if isinstance(entries, PackedEntries) else entries


def entry_bytes(nope_dim: int, rope_dim: int) -> int:
    """Bytes of a compressed entry's row; 584 at V4 sizes."""
    return _aligned(nope_dim + 2 * rope_dim + _num_groups(nope_dim, KV_GROUP))


def index_key_bytes(width: int) -> int:
    """Bytes of an index key's row; 68 at V4 sizes. Raises ConfigError for an odd width."""
    if width % 2:
        raise ConfigError(
            f"Index keys of {width} channels cannot be packed: two FP4 channels share a byte. Choose an even "
            "index_head_dim, or keep index keys unpacked."
        )
    return _aligned(width // 2 + _num_groups(width, FP4_GROUP))


def encode_entries(x: Tensor, nope_dim: int) -> Tensor:
    """Entries [..., N + R] (fp32 or bf16) -> rows uint8 [..., Y]; `nope_dim` is N."""
    function = registry.pick("encode_entries", x)
    return function(x, nope_dim)


def decode_entries(rows: Tensor, nope_dim: int, rope_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows uint8 [..., Y] -> entries [..., N + R]. Raises CacheError for rows of another length."""
    _expect(rows, entry_bytes(nope_dim, rope_dim), f"entries of {nope_dim} + {rope_dim} channels")
    return registry.pick("decode_entries", rows)(rows, nope_dim, rope_dim).to(dtype)


def encode_index_keys(x: Tensor) -> Tensor:
    """Index keys [..., K] (fp32 or bf16) -> rows uint8 [..., Y]. Raises ConfigError for an odd K."""
    index_key_bytes(x.shape[-1])
    return registry.pick("encode_index_keys", x)(x)


def decode_index_keys(rows: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows uint8 [..., Y] -> index keys [..., K]; `width` is K. Raises CacheError for rows of another length."""
    _expect(rows, index_key_bytes(width), f"index keys of {width} channels")
    return registry.pick("decode_index_keys", rows)(rows, width).to(dtype)


# ---------------------------------------------------------------- references


def encode_entries_reference(x: Tensor, nope_dim: int) -> Tensor:
    """See `encode_entries`."""
    parts = [x[..., nope_dim:].to(torch.bfloat16).contiguous().view(torch.uint8)]
    if nope_dim:
        codes, scale = fp8(x[..., :nope_dim], math.gcd(nope_dim, KV_GROUP))
        parts = [codes.view(torch.uint8), *parts, encode_e8m0(scale).view(torch.uint8)]
    return _padded(parts)


def decode_entries_reference(rows: Tensor, nope_dim: int, rope_dim: int) -> Tensor:
    """See `decode_entries`; fp32."""
    after, groups = nope_dim + 2 * rope_dim, _num_groups(nope_dim, KV_GROUP)
    rope = rows.new_empty(*rows.shape[:-1], rope_dim, dtype=torch.bfloat16)
    if rope_dim:
        rope.view(torch.uint8).copy_(rows[..., nope_dim:after])
    if not nope_dim:
        return rope.float()
    codes = rows[..., :nope_dim].contiguous().view(torch.float8_e4m3fn)
    scale = decode_e8m0(rows[..., after : after + groups].contiguous())
    return torch.cat([dequantize_groups(codes, scale, nope_dim // groups), rope.float()], -1)


def encode_index_keys_reference(x: Tensor) -> Tensor:
    """See `encode_index_keys`."""
    values, scale = fp4(x, math.gcd(x.shape[-1], FP4_GROUP))
    values = torch.where(values.isnan(), 0.0, values)  # the scale says it, and e2m1 has no NaN
    return _padded([pack_fp4(values).view(torch.uint8), encode_e8m0(scale).view(torch.uint8)])


def decode_index_keys_reference(rows: Tensor, width: int) -> Tensor:
    """See `decode_index_keys`; fp32."""
    groups = _num_groups(width, FP4_GROUP)
    scale = decode_e8m0(rows[..., width // 2 : width // 2 + groups].contiguous())
    return dequantize_groups(unpack_fp4(rows[..., : width // 2]), scale, width // groups)


# ---------------------------------------------------------------- native twins


def _encode_entries_native(x: Tensor, nope_dim: int) -> Tensor:
    x = x.float().contiguous()
    width = x.shape[-1]
    rows = torch.empty(*x.shape[:-1], entry_bytes(nope_dim, width - nope_dim), dtype=torch.uint8)
    call("encode_entries", x, x.numel() // max(width, 1), nope_dim, width - nope_dim, rows)
    return rows


def _decode_entries_native(rows: Tensor, nope_dim: int, rope_dim: int) -> Tensor:
    rows = rows.contiguous()
    x = torch.empty(*rows.shape[:-1], nope_dim + rope_dim)
    call("decode_entries", rows, rows.numel() // rows.shape[-1], nope_dim, rope_dim, x)
    return x


def _encode_index_keys_native(x: Tensor) -> Tensor:
    x = x.float().contiguous()
    width = x.shape[-1]
    rows = torch.empty(*x.shape[:-1], index_key_bytes(width), dtype=torch.uint8)
    call("encode_keys", x, x.numel() // width, width, rows)
    return rows


def _decode_index_keys_native(rows: Tensor, width: int) -> Tensor:
    rows = rows.contiguous()
    x = torch.empty(*rows.shape[:-1], width)
    call("decode_keys", rows, rows.numel() // rows.shape[-1], width, x)
    return x


def _reachable(tensor: Tensor) -> bool:
    return tensor.is_cpu and load() is not None


for _name, _reference, _native in (
    ("encode_entries", encode_entries_reference, _encode_entries_native),
    ("decode_entries", decode_entries_reference, _decode_entries_native),
    ("encode_index_keys", encode_index_keys_reference, _encode_index_keys_native),
    ("decode_index_keys", decode_index_keys_reference, _decode_index_keys_native),
):
    registry.register(_name, "reference", _reference)
    registry.register(_name, "native", _native, _reachable)


# ---------------------------------------------------------------- shared pieces


def _num_groups(channels: int, group: int) -> int:
    return channels // math.gcd(channels, group) if channels else 0


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _padded(parts: list[Tensor]) -> Tensor:
    row = torch.cat(parts, -1)
    return torch.nn.functional.pad(row, (0, _aligned(row.shape[-1]) - row.shape[-1]))


def _expect(rows: Tensor, num_bytes: int, what: str) -> None:
    if rows.dtype != torch.uint8 or rows.shape[-1] != num_bytes:
        raise CacheError(
            f"Packed rows are {rows.dtype} of {rows.shape[-1]} bytes, but {what} need uint8 rows of {num_bytes}, so "
            "they cannot be read. They were written for another model; discard this cache."
        )
