"""What a checkpoint folder holds, read from headers alone: no weight is loaded, no model built in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rorqual.checkpoint.build import read_config
from rorqual.checkpoint.drafter import without_drafter
from rorqual.checkpoint.names import to_official
from rorqual.checkpoint.report import Misfit, check_kinds, layout_of, match, packed_tensors
from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.checkpoint.transformers_layout import without_absent_mtp
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.model import Transformer
from rorqual.tokenizer import V4_VOCABULARY, Tokenizer, identify


@dataclass(frozen=True)
class DtypeShare:
    """Tensors and bytes stored in one dtype."""

    tensors: int
    nbytes: int


@dataclass(frozen=True)
class TokenizerSummary:
    """The tokenizer beside the weights. `is_right` is None when there is none."""

    is_right: bool | None
    words: str


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
    stored: list[tuple[str, str, int]]
    """Every tensor: official name, dtype, bytes."""
    is_packed: bool
    """Weights are FP8 or FP4 codes; a load turns them into numbers of the dtype asked for."""
    matching: int
    missing: list[str]
    unexpected: list[str]
    misshapen: list[Misfit]
    tokenizer: TokenizerSummary
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
            stored=[(to_official(info.name), info.dtype, info.nbytes) for info in stored],
            is_packed=is_packed,
            matching=len(found.fitting),
            missing=[tensor.name for tensor in found.missing],
            unexpected=[info.name for info in found.unexpected],
            misshapen=found.misshapen,
            tokenizer=check_tokenizer(folder, config),
            note=note,
        )


def check_tokenizer(folder: Path, config: ModelConfig) -> TokenizerSummary:
    """Whether the folder's tokenizer is the one its model was trained with, as far as ids can tell.

    A V3 tokenizer beside V4 weights is recognised, and one of another vocabulary beside V4's 129,280 embeddings.
    """
    try:
        if not (folder / "tokenizer.json").is_file():
            return TokenizerSummary(None, "put the model's tokenizer.json beside its weights")
        tokenizer = Tokenizer.from_folder(folder)
        identity = identify(tokenizer)
        tokenizer.check_fits(config.vocab_size)
    except CheckpointError as error:
        return TokenizerSummary(False, str(error))
    if identity.family == "v3" or identity.family == "other":
        return TokenizerSummary(False, f"{identity.words}. Use the tokenizer.json of the V4 checkpoint.")
    if config.vocab_size == V4_VOCABULARY and identity.family != "v4":
        return TokenizerSummary(
            False,
            f"{identity.words}, but the model has V4's {V4_VOCABULARY}. Use the tokenizer.json of that checkpoint.",
        )
    markers = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if markers != (config.bos_token_id, config.eos_token_id):
        return TokenizerSummary(
            False,
            f"it begins texts with {markers[0]} and ends them with {markers[1]}, the config "
            f"with {config.bos_token_id} and {config.eos_token_id}. Use the tokenizer.json saved with the model.",
        )
    return TokenizerSummary(True, identity.words)
