"""The arms of the ablations: which network each one is, at equal forward FLOPs, and how it is trained.

The base is the `minke` preset as V4 has it (CSA and HCA, mHC, one hash-routed layer, MTP, Muon). An arm changes one
ingredient; the width of its experts then makes up for the compute that the change saves or costs, so that all arms have
the same forward FLOPs per token (`rorqual.planner.forward_flops`, without MTP) within one percent.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig
from rorqual.planner import count_parameters, forward_flops
from rorqual.train.config import TrainConfig
from rorqual.train.recipe_file import validate
from rorqual.train.settings import flatten

TOLERANCE = 0.01
"""Largest relative difference of forward FLOPs between arms; Engram's parameters come out as near."""

TOKENIZER = Path(__file__).parents[1] / "rorqual" / "assets" / "minke"


@dataclass(frozen=True)
class Settings:
    """What all arms of one sitting share."""

    tokens: int = 300_000
    tokens_per_step: int = 2048
    seq_len: int = 512
    lr: float = 2e-3
    """Learning rate of every arm outside the search for Muon's and AdamW's best."""
    muon_lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    adamw_lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    eval_tokens: int = 65_536
    micro_batch_tokens: int = 2048
    dtype: str = "bf16"
    depth_layers: int = 61
    depth_tokens: int = 100_000
    is_quick: bool = False


@dataclass(frozen=True)
class Arm:
    """One variant."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the architecture that differ from the base."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the recipe by dotted name."""
    target: str = "total"
    """FLOPs to match: `total` (the network) or `training` (with the MTP module's share)."""
    preset: str = "minke"


def arms(settings: Settings) -> dict[str, Arm]:
    """Every arm that this checkout can run, by name; learning-rate arms are made by `at_lr`."""
    base = _base(settings)
    n, mtp = base.num_hidden_layers, base.num_nextn_predict_layers
    whole_row = {"compress_ratios": [0] * (n + mtp), "sliding_window": settings.seq_len}
    found = [
        Arm("v4"),
        Arm("plain", {"residual": "plain", "hc_mult": 1}),
        Arm("hc", {"residual": "hc"}),
        Arm("full-attention", whole_row),
        Arm("no-hash", {"num_hash_layers": 0}),
        Arm("no-mtp", {"num_nextn_predict_layers": 0}),
        Arm("no-mtp-wide", {"num_nextn_predict_layers": 0}, target="training"),
    ]
    if not settings.is_quick:
        found.append(Arm("engram", preset="minke-engram"))
    found.append(Arm("qat-fp4", train={"qat.mode": "fp4"}))
    return {arm.name: arm for arm in found}


STUDIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "optimizer": ("muon", ("adamw",)),
    "residual": ("v4", ("plain", "hc")),
    "attention": ("v4", ("full-attention",)),
    "hash": ("v4", ("no-hash",)),
    "mtp": ("v4", ("no-mtp", "no-mtp-wide")),
    "engram": ("v4", ("engram", "ngram")),
    "qat": ("v4", ("qat-fp4",)),
}
"""Study: its base and the variants held against it. `muon` and `adamw` stand for each at its best learning rate."""


def at_lr(kind: str, lr: float, settings: Settings) -> Arm:
    """The base trained by `muon` or `adamw` at a learning rate; Muon at the common one is `v4` itself."""
    if kind == "muon" and lr == settings.lr:
        return Arm("v4")
    return Arm(f"{kind}@{lr:g}", train={"optim.matrix_optimizer": kind, "optim.lr": lr, "optim.end_lr": lr / 10})


def arm_named(name: str, settings: Settings) -> Arm:
    """An arm from its name. Raises: KeyError for an unknown one."""
    kind, at, lr = name.partition("@")
    return at_lr(kind, float(lr), settings) if at else arms(settings)[name]


@lru_cache
def network(arm_name: str, settings: Settings) -> ModelConfig:
    """The arm's network, its experts widened or narrowed to the base's forward FLOPs.

    Raises: ValueError when no width comes within the tolerance.
    """
    arm = arm_named(arm_name, settings)
    base = _base(settings)
    target = getattr(forward_flops(base, settings.seq_len), arm.target)
    cfg = (base if arm.preset == "minke" else ModelConfig.preset(arm.preset)).replace(**arm.model)
    fitted = _at_flops(cfg, target, settings.seq_len, arm.name)
    return fitted if fitted.engram is None else _at_parameters(fitted, count_parameters(base).total)


def _at_parameters(cfg: ModelConfig, wanted: int) -> ModelConfig:
    """`cfg` with Engram tables of the length that brings all weights to `wanted`; a lookup costs no FLOPs."""
    engram = cfg.engram
    assert engram is not None
    per_row = len(engram.layers) * len(engram.orders) * engram.heads * engram.head_dim
    rows = engram.rows + round((wanted - count_parameters(cfg).total) / per_row)
    return cfg.replace(engram=dataclasses.replace(engram, rows=rows))


def _base(settings: Settings) -> ModelConfig:
    """The network that arms are compared with."""
    minke = ModelConfig.preset("minke")
    if not settings.is_quick:
        return minke
    return minke.replace(
        hidden_size=32, num_hidden_layers=3, compress_ratios=(0, 4, 8, 0), num_attention_heads=2, head_dim=16,
        qk_rope_head_dim=8, q_lora_rank=16, o_lora_rank=16, index_n_heads=2, index_head_dim=16, index_topk=4,
        sliding_window=16, n_routed_experts=4, moe_intermediate_size=64,
    )  # fmt: skip


def _at_flops(cfg: ModelConfig, target: float, seq_len: int, name: str) -> ModelConfig:
    """`cfg` with the even expert width that comes nearest to `target` FLOPs per token (they are linear in it)."""
    now = forward_flops(cfg, seq_len).total
    if now == target:
        return cfg
    slope = forward_flops(cfg.replace(moe_intermediate_size=cfg.moe_intermediate_size + 2), seq_len).total - now
    width = cfg.moe_intermediate_size + 2 * round((target - now) / slope)
    if width < 2:
        raise ValueError(f"arm {name}: even without experts it needs more than {target:,.0f} FLOPs per token")
    fitted = cfg.replace(moe_intermediate_size=width)
    gap = forward_flops(fitted, seq_len).total / target - 1
    if abs(gap) > TOLERANCE:
        raise ValueError(f"arm {name}: the nearest width {width} is {gap:+.2%} off {target:,.0f} FLOPs per token")
    return fitted


def overrides(cfg: ModelConfig, preset: str) -> dict[str, Any]:
    """What `model.overrides` must say to turn `preset` into `cfg`."""
    start = ModelConfig.preset(preset)
    names = [f.name for f in dataclasses.fields(cfg) if f.name != "extra"]
    return {name: _plain(getattr(cfg, name)) for name in names if getattr(cfg, name) != getattr(start, name)}


def recipe(arm: Arm, seed: int, settings: Settings, folder: Path, cache: Path) -> TrainConfig:
    """The training config of one run. Raises: ConfigError when the checkout does not know one of its settings."""
    steps = max(1, round(settings.tokens / settings.tokens_per_step))
    cfg = network(arm.name, settings)
    tree = _common(settings, seed, folder, cache, settings.tokens, steps)
    tree["model"] = {"preset": arm.preset, "overrides": overrides(cfg, arm.preset)}
    for name, value in arm.train.items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    return validate(tree)


def depth_recipe(residual: str, seed: int, settings: Settings, folder: Path, cache: Path) -> TrainConfig:
    """A deep, narrow network with window and HCA layers by turns, the same but for the residual path."""
    n = settings.depth_layers
    steps = max(1, round(settings.depth_tokens / settings.tokens_per_step))
    tree = _common(settings, seed, folder, cache, settings.depth_tokens, steps)
    changes = {
        "residual": residual, "hc_mult": 1 if residual == "plain" else 4, "num_hidden_layers": n, "hidden_size": 64,
        "compress_ratios": [32 * (i % 2) for i in range(n)], "num_nextn_predict_layers": 0, "num_hash_layers": 0,
        "num_attention_heads": 2, "head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16,
        "sliding_window": 32, "n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
    }  # fmt: skip
    tree["model"] = {"preset": "minke", "overrides": changes}
    tree["loss"] |= {"mtp": 0.0, "mtp_end": 0.0}
    tree["run"]["export_dtype"] = "fp32"
    return validate(tree)


def _common(settings: Settings, seed: int, folder: Path, cache: Path, tokens: int, steps: int) -> dict[str, Any]:
    source: dict[str, Any] = {"kind": "python", "include_tests": True}
    if settings.is_quick:  # the package's own sources: small, and always there
        source = {"kind": "path", "path": str(TOKENIZER.parents[1] / "data")}
    return {
        "data": {
            "sources": [source],
            "tokenizer": str(TOKENIZER),
            "cache": str(cache),
            "held_out": 0.2 if settings.is_quick else 0.02,
        },
        "optim": {"lr": settings.lr, "end_lr": settings.lr / 10, "muon_dtype": settings.dtype},
        "schedule": {
            "total_tokens": tokens,
            "tokens_per_step": settings.tokens_per_step,
            "seq_lens": [(0.0, settings.seq_len)],
            "warmup_steps": max(1, steps // 10),
        },
        "loss": {"bias_speed": 0.01},
        # A roll-back would hide a spike, which is part of what is compared.
        "stability": {"detect": False},
        "run": {
            "folder": str(folder),
            "seed": seed,
            "threads": 1,
            "processes": 1,
            "dtype": settings.dtype,
            "micro_batch_tokens": settings.micro_batch_tokens,
            "log_every": 1,
            "eval_every": 0,
            "eval_tokens": settings.eval_tokens,
            "keep_checkpoints": 1,
        },
    }


def digest(config: TrainConfig) -> str:
    """What identifies a run's settings: everything that decides its result, so no paths and no seed."""
    skipped = {"run.folder", "run.seed", "data.cache", "data.tokenizer", "data.sources"}
    values = {k: v for k, v in flatten(config).items() if k not in skipped}
    default = flatten(TrainConfig())
    changed = {k: v for k, v in values.items() if v != default[k]}  # so that new settings change no old digest
    return hashlib.blake2b(json.dumps(changed, sort_keys=True).encode(), digest_size=6).hexdigest()


def _plain(values: Any) -> Any:
    """Values as a TOML recipe can hold them."""
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = dataclasses.asdict(values)
    if isinstance(values, Mapping):
        return {k: _plain(v) for k, v in values.items()}
    return [_plain(v) for v in values] if isinstance(values, list | tuple) else values
