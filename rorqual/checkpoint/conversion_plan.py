"""What a conversion will write: the target's files, their tensors, and what each is made of."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rorqual.checkpoint import official, transformers_layout
from rorqual.checkpoint.build import STORABLE
from rorqual.checkpoint.layout import FileTensor, Part, file_tensors
from rorqual.checkpoint.names import stays_fp32
from rorqual.checkpoint.packed import Stored, describe, scale_name, scale_shape, stored_tensors
from rorqual.checkpoint.pieces import SCALES, Piece, Source, pieces_of
from rorqual.checkpoint.piecewise import Entry, header_of
from rorqual.checkpoint.safetensors_io import shard_names
from rorqual.checkpoint.store import stored_config
from rorqual.model.quantised import ExpertFormat, StoredFormat

LAYOUTS = {"official": official.LAYOUT, "transformers": transformers_layout.LAYOUT}
Target = Literal["official", "transformers"]


@dataclass(frozen=True)
class PlannedFile:
    """One file to be written: its tensors and what they are made of."""

    name: str
    stored: list[Stored]
    entries: list[Entry]

    @property
    def nbytes(self) -> int:
        return len(header_of(self.entries)) + sum(entry.nbytes for entry in self.entries)


def plan_tensors(
    weights: Source, to: Target, dtype: torch.dtype | None, experts: ExpertFormat | None
) -> tuple[list[Stored], dict[str, Any]]:
    """The tensors of the target and its config.json."""
    plain = file_tensors(weights.shapes, LAYOUTS[to].is_fused)
    if experts is not None:
        stored = stored_tensors(plain, weights.state, experts)
    else:
        stored = [item for tensor in plain for item in _as_it_is(weights, tensor, to, dtype)]
    packed: set[StoredFormat] = {item.kind for item in stored if item.is_scale}
    shown = torch.bfloat16 if packed else next(item.dtype for item in stored if item.tensor.name == "embed.weight")
    description = LAYOUTS[to].describe(stored_config(weights.config, shown))
    if packed:
        description = describe(description, "fp4" if "fp4" in packed else "fp8")
    return stored, description


def _as_it_is(weights: Source, tensor: FileTensor, to: Target, dtype: torch.dtype | None) -> list[Stored]:
    """The target's tensor for `tensor`, and its scales where codes are kept."""
    piece = next(pieces_of(tensor, weights.shapes))
    kind = weights.kind(piece)
    if kind is None:
        own = weights.dtype(piece)
        if not own.is_floating_point:
            return [Stored(tensor, torch.int64, "fp32")]
        own = own if own in STORABLE else torch.float32
        return [Stored(tensor, torch.float32 if stays_fp32(tensor.name) else dtype or own, "fp32")]
    if to != "official" or dtype is not None:
        return [Stored(tensor, dtype or torch.bfloat16, "bf16")]
    info = weights.scale_info(piece)
    assert info is not None
    shape = (tensor.shape[0], tensor.shape[1] // 2) if kind == "fp4" else tensor.shape
    codes = Stored(
        FileTensor(tensor.name, shape, tensor.parts), torch.int8 if kind == "fp4" else torch.float8_e4m3fn, kind
    )
    scale = FileTensor(scale_name(tensor.name), scale_shape(tensor.shape, kind), tensor.parts)
    dtype_of_scale = torch.float32 if info.dtype == "F32" else torch.float8_e8m0fnu
    return [codes, Stored(scale, dtype_of_scale, kind, is_scale=True)]


def plan_files(weights: Source, stored: list[Stored], to: Target, shard_bytes: int) -> list[PlannedFile]:
    """The files of the target: its shards, and the scales where codes are unpacked."""
    layout, by_name = LAYOUTS[to], {item.tensor.name: item for item in stored}

    def entry(item: Stored) -> Entry:
        return Entry(layout.spell(item.tensor.name), item.dtype, item.tensor.shape)

    def nbytes(tensor: FileTensor) -> int:
        return entry(by_name[tensor.name]).nbytes

    tensors = [item.tensor for item in stored]
    groups = [tensors] if sum(map(nbytes, tensors)) <= shard_bytes else layout.split(tensors, nbytes, shard_bytes)
    shards = [[by_name[tensor.name] for tensor in group] for group in groups]
    names = shard_names(len(shards))
    files = [
        PlannedFile(name, group, [entry(item) for item in group]) for name, group in zip(names, shards, strict=True)
    ]
    unpacked = [
        piece
        for item in stored
        if item.kind == "bf16" and not item.is_scale
        for piece in pieces_of(item.tensor, weights.shapes)
        if weights.kind(piece) is not None
    ]
    scales = [_scale_of(weights, piece) for piece in unpacked] if to == "transformers" else []
    if scales:
        files.append(PlannedFile(SCALES, scales, [Entry(s.tensor.name, s.dtype, s.tensor.shape) for s in scales]))
    return files


def _scale_of(weights: Source, piece: Piece) -> Stored:
    info, kind = weights.scale_info(piece), weights.kind(piece)
    assert info is not None and kind is not None
    dtype = torch.float32 if info.dtype == "F32" else torch.float8_e8m0fnu
    parts = (Part(piece.ours, piece.expert),)
    return Stored(FileTensor(scale_name(piece.official), info.shape, parts), dtype, kind, is_scale=True)
