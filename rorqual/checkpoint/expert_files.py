"""Where the routed experts of a checkpoint lie in its files, and one of them read into a slot of memory.

An expert is six tensors: codes and scales of w1, w3 and w2. Where the files hold the wanted format its codes are used
as they are read; the neighbours among its tensors (all codes, all scales) are read in one go. Otherwise the numbers are
unpacked and packed again, by the same functions as for a model that is loaded whole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.collector import pack_stored
from rorqual.checkpoint.direct_io import DirectFiles, aligned, room
from rorqual.checkpoint.safetensors_io import DTYPES, TensorInfo
from rorqual.ops.packed_weight import PackedFormat, PackedWeight, pack
from rorqual.ops.streamed_experts import PLACES

MATRICES = ("w1", "w3", "w2")
"""In the order of an expert's addresses."""
GAP_BYTES = 1 << 16
"""Tensors that lie this near to each other are read together."""


@dataclass(frozen=True)
class Extent:
    """A part of a file: bytes `begin` (aligned) to `end`, read to place `at` (aligned) of a buffer."""

    path: Path
    begin: int
    end: int
    at: int


@dataclass
class ExpertFile:
    """The stored tensors of one expert: by matrix its weight, and its scale where there is one."""

    weights: dict[str, TensorInfo] = field(default_factory=dict)
    scales: dict[str, TensorInfo] = field(default_factory=dict)
    extents: list[Extent] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    """Where in a buffer a tensor comes to lie, by its name in the file."""

    def arrange(self) -> None:
        """Decide what is read together, and to where."""
        everything = [*self.weights.values(), *self.scales.values()]
        runs: list[list[TensorInfo]] = []
        for info in sorted(everything, key=lambda one: (str(one.path), one.start)):
            last = runs[-1][-1] if runs else None
            if last is not None and last.path == info.path and info.start - last.start - last.nbytes <= GAP_BYTES:
                runs[-1].append(info)
            else:
                runs.append([info])
        at = 0
        for run in runs:
            begin, end = run[0].start, run[-1].start + run[-1].nbytes
            first, behind = aligned(begin, end)
            self.extents.append(Extent(run[0].path, first, end, at))
            self.places |= {info.name: at + info.start - first for info in run}
            at += behind - first

    @property
    def read_bytes(self) -> int:
        """Of a buffer that holds all extents."""
        return self.extents[-1].at + _span(self.extents[-1])

    def tensor(self, info: TensorInfo, buffer: Tensor) -> Tensor:
        """A stored tensor in a buffer that was read."""
        at = self.places[info.name]
        raw, dtype = buffer[at : at + info.nbytes], DTYPES[info.dtype]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)


class ExpertReader:
    """Reads experts, all of one shape, into slots of `slot_bytes`.

    shape: (E, I, D). Experts are known by layer (name of the stack, such as `layers.3.ffn.experts`) and number.
    """

    def __init__(self, files: dict[tuple[str, int], ExpertFile], kind: PackedFormat, shape: tuple[int, int, int]):
        self.files, self.kind, self.shape = files, kind, shape
        self._direct = DirectFiles()
        _, inner, hidden = shape
        self.sizes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
        for file in files.values():
            file.arrange()
        self.is_raw = all(_is_stored_as(file, kind) for file in files.values())
        """Whether codes are used as they are read."""
        self.read_bytes = max(file.read_bytes for file in files.values())
        empty = [pack(torch.zeros(size), kind) for size in self.sizes.values()]
        self._parts = [part for one in empty for part in (one.codes, one.scale)]
        """What the six places hold: their dtypes and shapes."""
        own = [part for part in self._parts if part is not None and not (self.is_raw and _is_read(part))]
        self._own_bytes = sum(_padded(part.nbytes) for part in own)
        self.slot_bytes = aligned(0, self._own_bytes + (self.read_bytes if self.is_raw else 0))[1]

    def layers(self) -> list[str]:
        """Names of the layers' stacks, in order."""
        return list(dict.fromkeys(layer for layer, _ in self.files))

    @torch.inference_mode()  # memory of a model that was loaded in it could not be written otherwise
    def read(self, layer: str, expert: int, slot: Tensor) -> tuple[list[int], int]:
        """Bring an expert into a slot uint8 [slot_bytes], aligned: its addresses, and how many bytes were read.

        Raises: CheckpointError as `DirectFiles.read`.
        """
        file = self.files[layer, expert]
        buffer = slot if self.is_raw else room(self.read_bytes)
        for extent in file.extents:
            self._direct.read(extent.path, extent.begin, extent.end, buffer[extent.at :])
        places, at = [0] * PLACES, self.read_bytes if self.is_raw else 0
        for number, matrix in enumerate(MATRICES):
            weight, scale = file.weights[matrix], file.scales.get(matrix)
            value = file.tensor(weight, buffer)
            codes = None if scale is None else value
            one = pack_stored(value, codes, None if scale is None else file.tensor(scale, buffer), self.kind)
            for half, part in enumerate((one.codes, one.scale)):
                if part is None:
                    continue
                if self.is_raw and _is_read(part):
                    places[2 * number + half] = part.data_ptr()
                    continue
                mine = slot[at : at + part.nbytes]
                mine.copy_(part.contiguous().view(-1).view(torch.uint8))
                places[2 * number + half] = mine.data_ptr()
                at += _padded(part.nbytes)
        return places, sum(extent.end - extent.begin for extent in file.extents)

    def matrices(self, places: Sequence[int], slot: Tensor) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """w1, w3 and w2 of the expert that lies in a slot at these addresses."""
        base, out = slot.data_ptr(), []
        for number, matrix in enumerate(MATRICES):
            pair = []
            for half in (0, 1):
                like = self._parts[2 * number + half]
                at = places[2 * number + half] - base
                pair.append(None if like is None else slot[at : at + like.nbytes].view(like.dtype).view(like.shape))
            assert pair[0] is not None
            out.append(PackedWeight(self.kind, pair[0], pair[1], self.sizes[matrix]))
        return out[0], out[1], out[2]


def _is_stored_as(file: ExpertFile, kind: PackedFormat) -> bool:
    """Whether an expert's codes in the file are those of format `kind`."""
    stored = {"fp4": ("I8", "U8"), "fp8": ("F8_E4M3",), "bf16": ("BF16",), "fp32": ("F32",)}.get(kind, ())
    if kind in ("bf16", "fp32") and any(info.start % 64 for info in file.weights.values()):
        return False  # numbers of several bytes are read where they lie
    return all(info.dtype in stored for info in file.weights.values()) and (
        kind != "fp4" or all(info.dtype in ("U8", "F8_E8M0") for info in file.scales.values())
    )


def _is_read(part: Tensor) -> bool:
    """Whether a part of a packed weight stands in the file as in memory: bytes do, FP32 scales are made."""
    return part.dtype == torch.uint8


def _span(extent: Extent) -> int:
    begin, end = aligned(extent.begin, extent.end)
    return end - begin


def _padded(nbytes: int) -> int:
    return math.ceil(nbytes / 64) * 64
