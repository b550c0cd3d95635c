"""Checkpoints whose `mtp.*` tensors are no MTP module but a drafter of another kind: loaded without it.

V4-Flash-0731 and its relatives keep V4's backbone and replace the MTP module by DSpark, a drafter of three stages that
reads the hidden states of the last layers (arXiv 2607.05147). What they answer does not depend on it. It is told by its
tensors, which no MTP module has; `compress_ratios` then has an entry more for each stage.
"""

import re

from rorqual.checkpoint.safetensors_io import CheckpointFiles
from rorqual.config import ModelConfig

_DSPARK = re.compile(r"mtp\.\d+\.(?:main_proj|main_norm|markov_head|confidence_head)\b.*")


def has_drafter(files: CheckpointFiles) -> bool:
    """Whether the files hold a DSpark drafter where others have an MTP module."""
    return any(_DSPARK.fullmatch(name) for name in files.tensors)


def without_drafter(config: ModelConfig, files: CheckpointFiles) -> tuple[ModelConfig, str | None]:
    """The config to build, and what to tell people where `files` hold a DSpark drafter, which they then forget."""
    if not has_drafter(files):
        return config, None
    dropped = {name: info for name, info in files.tensors.items() if name.startswith("mtp.")}
    stages = len({name.split(".")[1] for name in dropped})
    for name in dropped:
        del files.tensors[name]
    nbytes = sum(info.nbytes for info in dropped.values())
    plain = config.replace(
        num_nextn_predict_layers=0,
        compress_ratios=config.compress_ratios[: config.num_hidden_layers],
        extra={key: value for key, value in config.extra.items() if not key.startswith("dspark")},
    )
    return plain, (
        f"the mtp.* tensors are a DSpark drafter of {stages} stage(s) ({len(dropped)} tensors, {nbytes / 1e6:,.1f} MB) "
        "and not MTP: the model is loaded without it. Answers are the same; drafting (--speculate) is not available."
    )
