"""Every setting of a recipe by its dotted name, and which of them a resumed run may change."""

from typing import Any

from pydantic import BaseModel

from rorqual.train.config import ParallelSection, TrainConfig

HARMLESS = frozenset(
    [
        "data.cache",
        "run.folder",
        "run.checkpoint_every_s",
        "run.keep_checkpoints",
        "run.log_every",
        "run.eval_every",
        "run.eval_tokens",
        "run.max_steps",
        "run.sample_prompts",
        "run.sample_tokens",
        "run.report",
        "run.export_dtype",
    ]
)
"""Settings that may differ on resume: they change what is written, not a single weight."""

LAYOUT = frozenset(["run.processes", "run.threads", *(f"parallel.{name}" for name in ParallelSection.model_fields)])
"""Settings that may differ on resume too: they say who computes what, so results differ by the order of additions."""


def flatten(config: BaseModel) -> dict[str, Any]:
    """Every setting by dotted name, lists and free tables as one value."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            flat.update({f"{name}.{key}": v for key, v in flatten(value).items()})
        else:
            flat[name] = plain(value)
    return flat


def breaking_changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Settings whose change would make a resumed run differ from the uninterrupted one, as `name: old ->
    new`.
    """
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in before
        if name not in HARMLESS | LAYOUT and before[name] != after[name]
    ]


def layout_changes(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Settings of who computes what that are others now, as `name: old -> new`."""
    before, after = flatten(old), flatten(new)
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in sorted(LAYOUT) if before[name] != after[name]]


def plain(value: Any) -> Any:
    """A setting as TOML knows it: sections are tables without what is unset, tuples are lists."""
    if isinstance(value, BaseModel):
        return {k: v for k, v in value.model_dump().items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value
