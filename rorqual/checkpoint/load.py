"""`rorqual.load`: a model and its tokenizer from a name or a folder.

A name is looked up in this order: bundled with the package, a local folder, a Hub id `owner/name[@revision]`
(downloaded through the optional `hub` extra).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from rorqual.checkpoint.adapters import merge_adapter
from rorqual.checkpoint.build import read_config
from rorqual.checkpoint.hub import HUB_FILES, HUB_ID, import_hub
from rorqual.checkpoint.official import load_official
from rorqual.checkpoint.report import layout_of
from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.checkpoint.streaming import MemoryBudget
from rorqual.checkpoint.summary import check_tokenizer
from rorqual.checkpoint.transformers_layout import load_transformers
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.model import Transformer
from rorqual.model.quantised import keep_cache_as

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer

ASSETS = Path(__file__).parent.parent / "assets"
"""Bundled models, one folder each."""


def bundled_names() -> list[str]:
    """Models that travel with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def locate(name_or_path: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a bundled name, a path or a Hub id (downloading those `files` of the latter if needed).

    Raises: CheckpointError when nothing has that name; MissingExtraError for a Hub id without the extra.
    """
    text = str(name_or_path)
    if not text:
        raise CheckpointError("the model's name is empty, so it is not clear what is meant. Name a model or a folder.")
    if text in bundled_names():
        return ASSETS / text
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    hub_id = HUB_ID.fullmatch(text)
    bundled = ", ".join(bundled_names()) or "none in this installation"
    if hub_id is None or isinstance(name_or_path, Path) or text.startswith("."):
        raise CheckpointError(
            f"there is no model {text!r}: no bundled model has that name and no such folder exists, so "
            f"nothing can be loaded. Bundled models: {bundled}. Give one of them, a folder with config.json "
            "and weights, or a Hub id such as owner/name."
        )
    return _download(hub_id.group(1), hub_id.group(2), bundled, files)


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,
    weights: str | None = None,
    memory: int | str | MemoryBudget | None = None,
) -> Transformer:
    """Load a local folder in either layout (recognised by its tensor names); arguments as `load_official`."""
    with CheckpointFiles(folder) as files:
        loader = load_official if layout_of(files) == "official" else load_transformers
    return loader(folder, dtype=dtype, device=device, strict=strict, weights=weights, memory=memory)


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    memory: int | str | MemoryBudget | None = None,
    cache: str | None = None,
    adapter: str | Path | None = None,
) -> "tuple[Transformer, Tokenizer]":
    """A model ready to use (in eval mode) and its tokenizer.

    weights: keep matrices packed for inference: "fp4" (experts FP4, projections FP8), "fp4-int8" or "fp4-bf16" (other
        projections), "fp8", "int8" or "bf16".
    memory: what the process may hold, bytes or a size such as "6GiB": routed experts then stay on disk and are read as
        they are used, for models larger than memory; `dtype` is then the config's unless given (see `load_official`).
    cache: how sequences' memories are kept, `ModelConfig.cache_format`: "exact", "fp4-keys", "fp8" or "auto".
    adapter: a folder with a LoRA adapter in PEFT's layout, merged into the weights, or kept beside packed ones.
    Raises: CheckpointError (no such model, damaged files, no tokenizer.json), ConfigError, MissingExtraError.

        model, tokenizer = rorqual.load("minke")
    """
    folder = locate(name_or_path)
    tokenizer = _tokenizer(folder, read_config(folder))  # a wrong one is known before gigabytes are read
    model = load_model(folder, dtype=dtype, device=device, weights=weights, memory=memory)
    if adapter is not None:
        merge_adapter(model, adapter)
    if cache is not None:
        keep_cache_as(model, cache)
    model.eval()
    return model, tokenizer


class Described(NamedTuple):
    """A model without its weights."""

    cfg: ModelConfig
    tokenizer: "Tokenizer"


def describe(name_or_path: str | Path) -> Described:
    """Config and tokenizer of a model whose weights are not needed here, and of a Hub id not fetched.

    Raises: as `load`.
    """
    folder = locate(name_or_path, ["*.json"])
    config = read_config(folder)
    return Described(config, _tokenizer(folder, config))


def _tokenizer(folder: Path, config: ModelConfig) -> "Tokenizer":
    from rorqual.tokenizer import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json, so text cannot be turned into tokens. Put the model's "
            "tokenizer.json there, or load the weights alone with rorqual.checkpoint.load_model."
        )
    found = check_tokenizer(folder, config)
    if found.is_right is False:
        raise CheckpointError(f"the tokenizer in {folder} is not this model's: {found.words}")
    return Tokenizer.from_folder(folder)


def _download(repository: str, revision: str | None, bundled: str, files: Sequence[str]) -> Path:
    hub = import_hub(
        f"{repository!r} is no bundled model (they are: {bundled}) and no folder, so it would come from the Hugging "
        "Face Hub"
    )
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the Hub client raises many kinds: network, HTTP, file system, its own
        raise CheckpointError(
            f"{repository} could not be fetched from the Hugging Face Hub ({type(error).__name__}: {error}), "
            "so there is nothing to load. Check the id, the network and access rights. Bundled models need "
            f"neither: {bundled}."
        ) from error
