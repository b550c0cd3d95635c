"""A checkpoint as one GGUF file for llama.cpp, whose `deepseek4` architecture runs V4 (merged there in June 2026).

    experts in FP4           MXFP4: the same codes and scales, nibbles in that format's order; nothing is lost
    other matrices           BF16 where they are FP8 or bf16 (exact: scales are powers of two), F32 where they are fp32
    norms, mHC, sinks, ...   F32
    the hash layers' table   I32

Names and keys are those that llama.cpp's loader reads (its sources are the only document of them). Left out: the MTP
module, Engram and HCA ratios other than 128, which it does not have; the chat template (V4 has none). One file, written
a matrix at a time and renamed when it is whole.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.checkpoint.conversion_progress import OnBytes, check_free
from rorqual.checkpoint.gguf_names import gguf_name, key_values, tokenizer_values
from rorqual.checkpoint.layout import FileTensor, Part, Shape
from rorqual.checkpoint.names import split_stacked
from rorqual.checkpoint.pieces import Piece, Source, pieces_of
from rorqual.checkpoint.piecewise import disk_error, held
from rorqual.checkpoint.safetensors_io import sync, temporary
from rorqual.errors import CheckpointError, MissingExtraError
from rorqual.ops.quant import FP4_GROUP

_MXFP4_BYTES = 1 + FP4_GROUP // 2
"""Of a block: a scale, and two codes a byte."""


class GgufTensor(NamedTuple):
    """One tensor of the file: name there, type (F32, BF16, I32, MXFP4), shape as torch has it, and its pieces."""

    name: str
    kind: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def byte_shape(self) -> Shape:
        """Of its bytes, row by row."""
        *rows, width = self.shape
        per_row = {"F32": 4 * width, "I32": 4 * width, "BF16": 2 * width, "MXFP4": width // FP4_GROUP * _MXFP4_BYTES}
        return (*rows, per_row[self.kind])

    @property
    def nbytes(self) -> int:
        return torch.Size(self.byte_shape).numel()


class GgufExport(NamedTuple):
    """What was written: the file, its tensors by type, its bytes, and how many were read back and compared."""

    path: Path
    tensors: dict[str, int]
    nbytes: int
    verified: int | None
    left_out: list[str]


def export_gguf(
    source: str | Path, target: str | Path, *, verify: bool = True, on_bytes: OnBytes | None = None
) -> GgufExport:
    """Write the checkpoint in the folder `source` to the file `target` (a folder: `NAME.gguf` in it).

    Raises: MissingExtraError without the `gguf` extra; ConfigError for a model llama.cpp cannot express;
    CheckpointError for damaged files, a tokenizer it cannot follow, an existing target, a full disk, or a file that
    reads back wrong.
    """
    gguf = _import()
    source, target = Path(source), Path(target)
    path = target if target.suffix == ".gguf" else target / f"{source.resolve().name}.gguf"
    on_bytes = on_bytes or (lambda _what, _done, _total: None)
    with Source(source) as weights:
        values = [*key_values(weights.config, path.stem), *tokenizer_values(source, weights.config)]
        tensors = plan(weights)
        total = sum(tensor.nbytes for tensor in tensors)
        with held(path.parent, "converting"):
            if path.exists():
                raise CheckpointError(f"{path} is there already. Name another file, or delete it first.")
            check_free(path.parent, total)
            _write(gguf, weights, tensors, values, path, on_bytes)
        verified = _compare(gguf, weights, tensors, path, on_bytes) if verify else None
        left = sorted({name.split(".")[0] for name in weights.shapes if name.startswith("mtp.")})
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + 1
    return GgufExport(path, kinds, path.stat().st_size, verified, left)


def plan(weights: Source) -> list[GgufTensor]:
    """The tensors of the file, in model order."""
    out: list[GgufTensor] = []
    for ours, shape in weights.shapes.items():
        if ours.startswith("mtp."):
            continue
        pieces = tuple(pieces_of(FileTensor(ours, shape, (Part(ours),)), weights.shapes))
        out.append(GgufTensor(gguf_name(ours), _kind(weights, ours, shape, pieces), shape, pieces))
    return out


def _kind(weights: Source, ours: str, shape: Shape, pieces: tuple[Piece, ...]) -> str:
    stored = {weights.kind(piece) for piece in pieces}
    if stored == {"fp4"} and split_stacked(ours) is not None:
        return "MXFP4"
    if stored == {None} and not weights.dtype(pieces[0]).is_floating_point:
        return "I32"
    is_matrix = len(shape) > 1 and ours.endswith((".weight", "w1", "w2", "w3")) and not ours.endswith("gate.weight")
    exact_in_bf16 = None not in stored or weights.dtype(pieces[0]) is torch.bfloat16
    return "BF16" if is_matrix and exact_in_bf16 else "F32"


def bytes_of(weights: Source, tensor: GgufTensor, piece: Piece) -> Tensor:
    """A piece of `tensor` as uint8 [bytes]."""
    if tensor.kind == "MXFP4":
        return to_mxfp4(weights.read(piece), weights.read_scale(piece)).reshape(-1)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32}[tensor.kind]
    return weights.value(piece).to(dtype).contiguous().reshape(-1).view(torch.uint8)


def to_mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """FP4 codes [out, in/2] (int8) and scales [out, in/32] (e8m0) -> MXFP4 blocks, uint8 [out, in/32, 17].

    Here byte j holds channels 2j and 2j+1; a block of that format has its scale first, and its byte j holds channels j
    (low nibble) and j + 16.
    """
    nibbles = codes.contiguous().view(torch.uint8).unflatten(-1, (-1, FP4_GROUP // 2))
    values = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2)  # [out, in/32, 32]
    low, high = values[..., : FP4_GROUP // 2], values[..., FP4_GROUP // 2 :]
    return torch.cat((scale.contiguous().view(torch.uint8).unsqueeze(-1), low | high << 4), dim=-1)


def _write(
    gguf: Any, weights: Source, tensors: list[GgufTensor], values: list[tuple[str, Any]], path: Path, on_bytes: OnBytes
) -> None:
    beside = temporary(path)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    writer = gguf.GGUFWriter(str(beside), "deepseek4")
    try:
        for key, value in values:
            _add(gguf, writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        for tensor in tensors:
            writer.write_padding(out, out.tell())
            for piece in tensor.pieces:
                out.write(bytes_of(weights, tensor, piece).numpy().data)
                done += tensor.nbytes // len(tensor.pieces)
                on_bytes("write", done, total)
            writer.write_padding(out, tensor.nbytes)
        out.flush()
        writer.close()
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path, done, total) from error
    finally:
        beside.unlink(missing_ok=True)


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """A key with the type that its Python value stands for; whole numbers are unsigned."""
    types = gguf.GGUFValueType
    kind = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}[
        type(value)
    ]
    if kind is types.ARRAY and value and type(value[0]) is int:
        of = types.INT32 if key.endswith("token_type") else types.UINT32
        writer.add_key_value(key, value, kind, sub_type=of)
    elif kind is types.ARRAY and value and type(value[0]) is float:
        writer.add_key_value(key, value, kind, sub_type=types.FLOAT32)
    else:
        writer.add_key_value(key, value, kind)


def _compare(gguf: Any, weights: Source, tensors: list[GgufTensor], path: Path, on_bytes: OnBytes) -> int:
    """Read the file with the `gguf` package and compare every number. Raises: CheckpointError for one that differs."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        data, kind = found[tensor.name].data, gguf.GGMLQuantizationType[tensor.kind]
        for piece in tensor.pieces:
            part = data if piece.expert is None else data[piece.expert]
            numbers = part if tensor.kind in ("F32", "I32") else gguf.quants.dequantize(part, kind)
            value = weights.value(piece).double()
            read = torch.from_numpy(np.array(numbers)).double().reshape(value.shape)
            if not torch.equal(read, value):
                raise CheckpointError(
                    f"{tensor.name} in {path} does not read back as {piece.official}. Do not use the file; check the "
                    "disk and write it again."
                )
            done += tensor.nbytes // len(tensor.pieces)
            on_bytes("verify", done, total)
    if len(found) != len(tensors):
        raise CheckpointError(f"{path} holds {len(found)} tensors, {len(tensors)} were written. Write it again.")
    return len(tensors)


def _import() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "GGUF files are written with the gguf package, which is not installed. Install it with: pip install "
            '"rorqual[gguf]"'
        ) from error
    return gguf
