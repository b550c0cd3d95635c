"""What a checkpoint folder holds, read from headers alone: no weight is loaded, no model built in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rorqual.checkpoint.build import read_config
from rorqual.checkpoint.drafter import without_drafter
from rorqual.checkpoint.report import Misfit, check_kinds, layout_of, match, packed_tensors
from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.checkpoint.transformers_layout import without_absent_mtp
from rorqual.config import ModelConfig
from rorqual.model import Transformer


@dataclass(frozen=True)
class DtypeShare:
    """Tensors and bytes stored in one dtype."""

    tensors: int
    nbytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """A folder against its own config.json. Missing names are official ones, unexpected ones as stored."""

    folder: Path
    layout: Literal["official", "transformers"]
    config: ModelConfig
    """As a load would build it (without MTP where the files have none in the transformers layout)."""
    files: int
    tensors: int
    nbytes: int
    by_dtype: dict[str, DtypeShare]
    """In safetensors' words: F32, BF16, I64, F8_E4M3, ..."""
    is_packed: bool
    """Weights are FP8 or FP4 codes; a load turns them into numbers of the dtype asked for."""
    matching: int
    missing: list[str]
    unexpected: list[str]
    misshapen: list[Misfit]
    note: str | None = None
    """What a load leaves out, in a sentence."""

    @property
    def fits(self) -> bool:
        """Whether a strict load would find every tensor, and no other."""
        return not (self.missing or self.unexpected or self.misshapen)


def summarise(folder: str | Path) -> CheckpointSummary:
    """Read a folder's headers and hold them against its config.json.

    Raises: CheckpointError for missing or damaged files, ConfigError for an impossible config.json.
    """
    folder = Path(folder)
    config = read_config(folder)
    with CheckpointFiles(folder) as files:
        layout, stored = layout_of(files), list(files.tensors.values())
        nbytes, is_packed = files.nbytes, bool(packed_tensors(files))
        config, note = without_drafter(config, files)
        if layout == "transformers":
            config = without_absent_mtp(config, files)
        with torch.device("meta"):
            state = Transformer(config).state_dict()
        found = match(files, {name: tuple(tensor.shape) for name, tensor in state.items()})
        check_kinds(state, found)
        shares: dict[str, DtypeShare] = {}
        for info in stored:
            share = shares.get(info.dtype, DtypeShare(0, 0))
            shares[info.dtype] = DtypeShare(share.tensors + 1, share.nbytes + info.nbytes)
        return CheckpointSummary(
            folder=folder,
            layout=layout,
            config=config,
            files=len({info.path for info in stored}),
            tensors=len(stored),
            nbytes=nbytes,
            by_dtype=dict(sorted(shares.items())),
            is_packed=is_packed,
            matching=len(found.fitting),
            missing=[tensor.name for tensor in found.missing],
            unexpected=[info.name for info in found.unexpected],
            misshapen=found.misshapen,
            note=note,
        )
