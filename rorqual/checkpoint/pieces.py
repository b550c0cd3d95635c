"""The weights of a checkpoint folder, one matrix at a time, whichever layout they are stored in.

A piece is a parameter of ours, or one expert of a stack of them: the largest is the embedding. Reading by piece is what
lets `convert` go from one layout to another without ever holding a model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from rorqual.checkpoint.build import read_config
from rorqual.checkpoint.drafter import has_drafter
from rorqual.checkpoint.layout import FileTensor
from rorqual.checkpoint.names import expert_name, split_stacked
from rorqual.checkpoint.packed import unpack
from rorqual.checkpoint.report import check_kinds, layout_of, match, packed_format, refuse_misfits
from rorqual.checkpoint.safetensors_io import DTYPES, CheckpointFiles, TensorInfo, read_header
from rorqual.checkpoint.transformers_layout import without_absent_mtp
from rorqual.errors import CheckpointError
from rorqual.model import Transformer
from rorqual.model.quantised import StoredFormat

SCALES = "packed-scales.safetensors"
"""Beside weights that were unpacked: the scales they had, so that they can be packed again byte for byte."""


class Piece(NamedTuple):
    """One parameter of ours, or one expert of a stack."""

    ours: str
    expert: int | None = None

    @property
    def official(self) -> str:
        """Its name in the official layout."""
        stacked = split_stacked(self.ours)
        return self.ours if stacked is None or self.expert is None else expert_name(stacked[0], self.expert, stacked[1])


class _Place(NamedTuple):
    """Where a piece is stored: a tensor, its scales, the expert and the rows of it that are meant."""

    info: TensorInfo
    scale: TensorInfo | None
    expert: int | None
    rows: tuple[int, int] | None


class Source:
    """A folder's weights by piece. Use as a context manager.

    drop_mtp: leave `mtp.*` out, whatever it is (an MTP module or a drafter of another kind).
    Raises: CheckpointError for damaged files or weights that do not fit config.json, ConfigError for that file.
    """

    def __init__(self, folder: Path, *, drop_mtp: bool = False) -> None:
        self.folder = folder
        config = read_config(folder)
        self.files = CheckpointFiles(folder)
        self.layout = layout_of(self.files)
        if self.layout == "transformers":
            config = without_absent_mtp(config, self.files)
        if has_drafter(self.files) and not drop_mtp:
            raise CheckpointError(
                f"the mtp.* tensors in {folder} are a DSpark drafter and not MTP, and no layout here has a place for "
                "one. Convert what is left with drop_mtp=True (--drop-mtp)."
            )
        if drop_mtp:
            ratios = config.compress_ratios[: config.num_hidden_layers]
            config = config.replace(num_nextn_predict_layers=0, compress_ratios=ratios)
        self.config = config
        with torch.device("meta"):
            self.state = Transformer(config).state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        found = match(self.files, self.shapes)
        check_kinds(self.state, found)
        if drop_mtp:
            found.unexpected = [info for info in found.unexpected if not info.name.startswith("mtp.")]
        refuse_misfits(folder, found)
        self._places = {
            piece: _Place(info, found.scales.get(tensor.name), expert, rows)
            for tensor, info in found.fitting
            for piece, expert, rows in _stored_pieces(tensor, self.shapes)
        }
        self.scale_file = _ScaleFile(folder / SCALES) if (folder / SCALES).is_file() else None

    def kind(self, piece: Piece) -> StoredFormat | None:
        """fp4 or fp8 where the piece is stored as codes."""
        place = self._places[piece]
        return packed_format(place.info.dtype) if place.scale is not None else None

    def dtype(self, piece: Piece) -> torch.dtype:
        """As stored, for a piece that is no codes."""
        return DTYPES[self._places[piece].info.dtype]

    def scale_info(self, piece: Piece) -> TensorInfo | None:
        """The scales stored for a piece's codes."""
        return self._places[piece].scale

    def read(self, piece: Piece) -> Tensor:
        """The piece as stored: numbers, or codes."""
        place = self._places[piece]
        name = place.info.name
        whole = self.files.read(name) if place.expert is None else self.files.read_one(name, place.expert)
        return whole if place.rows is None else whole[place.rows[0] : place.rows[1]]

    def read_scale(self, piece: Piece) -> Tensor:
        """The scales of a piece's codes."""
        scale = self._places[piece].scale
        assert scale is not None, f"{piece.official} is not stored as codes"
        return self.files.read(scale.name)

    def value(self, piece: Piece) -> Tensor:
        """The piece's numbers, in fp32 where they are stored as codes."""
        return self.read(piece) if self.kind(piece) is None else unpack(self.read(piece), self.read_scale(piece))

    def pieces(self) -> Iterator[Piece]:
        """All of them, in model order."""
        yield from self._places

    def close(self) -> None:
        self.files.close()
        if self.scale_file is not None:
            self.scale_file.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def pieces_of(tensor: FileTensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[Piece]:
    """What a stored tensor consists of, as it lies in the file row by row."""
    first = tensor.parts[0]
    if first.expert is not None:
        yield Piece(first.ours, first.expert)
    elif split_stacked(first.ours) is None:
        yield Piece(first.ours)
    else:
        for expert in range(shapes[first.ours][0]):
            yield from (Piece(part.ours, expert) for part in tensor.parts)


def _stored_pieces(
    tensor: FileTensor, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[Piece, int | None, tuple[int, int] | None]]:
    rows = {part.ours: part.rows for part in tensor.parts}
    for piece in pieces_of(tensor, shapes):
        is_whole = tensor.parts[0].expert is not None or piece.expert is None
        yield piece, None if is_whole else piece.expert, rows[piece.ours]


class _ScaleFile:
    """The file called `SCALES`: e8m0 or fp32 scales by the official names of `X.scale`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = {info.name for info in read_header(path)}
        self._file: Any = safetensors.safe_open(path, framework="pt").__enter__()

    def read(self, name: str) -> Tensor | None:
        if name not in self.names:
            return None
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{self.path} could not be read at {name} ({error}). Copy the file again, or remove it: weights are "
                "then packed with scales by the rule."
            ) from error
        return tensor

    def close(self) -> None:
        self._file.__exit__(None, None, None)
