"""What a V4-style network is, as data.

`ModelConfig` uses the words of DeepSeek's released `config.json`. What each layer is (window only, CSA, HCA;
hash-routed or learned experts) stands in `ModelConfig.layers` as `LayerSpec`s; no other code asks which model this is.
Presets are files in `rorqual/presets/`. Source: released `config.json` files; V4 report section 2 and 4.2.1.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rorqual.config_dialects import FIXED, OWN_TYPE, read
from rorqual.config_engram import EngramConfig, check_engram, read_engram
from rorqual.errors import ConfigError

CSA_RATIO = 4
CACHE_FORMATS = ("auto", "exact", "fp4-keys", "fp8")
INDEX_SEARCHES = ("exact", "grouped")
"""Checkpoint behaviour: compression ratio 4 means overlapping windows and an indexer; any other ratio has neither."""

PRESET_FOLDER = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class LayerSpec:
    """What one layer is. The trunk's layers come first, then the MTP modules."""

    index: int
    """Position in the stack (for an MTP module: its position after the trunk)."""
    compress_ratio: int
    """Tokens per compressed entry; 0 means sliding window only."""
    hash_routed: bool
    """Experts come from a table over token ids instead of the router's top-k."""
    is_mtp: bool = False
    engram: bool = False
    """A memory of token runs is read before the attention (see `ModelConfig.engram`)."""

    @property
    def overlap(self) -> bool:
        """CSA entries pool the previous block too."""
        return self.compress_ratio == CSA_RATIO

    @property
    def has_indexer(self) -> bool:
        """CSA layers choose entries with the lightning indexer; HCA layers read all of them."""
        return self.compress_ratio == CSA_RATIO

    @property
    def kind(self) -> str:
        """`sliding`, `csa` or `hca`."""
        return "sliding" if self.compress_ratio == 0 else "csa" if self.has_indexer else "hca"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one model; immutable, checked on creation.

    Raises ConfigError (from the constructor) when the settings cannot describe a network.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    """One per layer, then one per MTP module (0: window only, 4: CSA, other: HCA)."""
    num_hash_layers: int = 3
    num_nextn_predict_layers: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    """Clamp of SwiGLU inputs; 0 switches it off."""
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    residual: str = "mhc"
    """What carries the streams past a sublayer: `mhc` (V4), `hc` (hyper-connections without its constraints) or `plain`
    (one stream, x + f(x)). Only `mhc` is a V4 network; the others are there to be compared with it."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """YaRN of the compressed layers: type, factor, original_max_position_embeddings, beta_fast, beta_slow."""
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    activation_rounding: str = "none"
    """`v4`: round KV entries to FP8 and index queries and keys to FP4 as the released weights expect; `v4-inputs`: the
    inputs of FP8 and FP4 matrices to FP8 as well; or `none`."""
    cache_format: str = "auto"
    """How memory keeps compressed entries and index keys, and so to what they are rounded: `exact`, as computed;
    `fp4-keys`, index keys (and queries) in FP4; `fp8`, that and entries in FP8 with bf16 rope, as in the released
    system; `auto`, as much of this as `activation_rounding` makes free of loss."""
    index_search: str = "exact"
    """How the indexer finds its entries in inference: `exact`, by the scores of all; `grouped`, an approximation for
    very long texts (`ops/index_groups.py`), the same up to 22,527 tokens."""
    engram: EngramConfig | None = None
    """Memory of token runs in some blocks; V4 has none. A mapping of its settings is taken too."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keys of the file that this class does not use; kept for the round trip."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        object.__setattr__(self, "engram", read_engram(self.engram))
        _check(self)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The trunk's schedule, first layer first."""
        ratios = self.compress_ratios
        memories = self.engram.layers if self.engram else ()
        return tuple(
            LayerSpec(i, ratios[i], i < self.num_hash_layers, engram=i in memories)
            for i in range(self.num_hidden_layers)
        )

    @cached_property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        """The MTP modules' layers: window only unless the file says otherwise, learned routing."""
        n = self.num_hidden_layers
        tail = self.compress_ratios[n:]
        return tuple(
            LayerSpec(n + j, tail[j] if j < len(tail) else 0, hash_routed=False, is_mtp=True)
            for j in range(self.num_nextn_predict_layers)
        )

    @property
    def nope_head_dim(self) -> int:
        """Channels of a head that rope leaves alone."""
        return self.head_dim - self.qk_rope_head_dim

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A named configuration: minke, minke-engram, bryde, sei, fin, blue, v4-flash, v4-pro.

        Raises ConfigError for any other name.
        """
        path = PRESET_FOLDER / f"{name}.json"
        if name not in preset_names():
            raise ConfigError(
                f"There is no preset named {name!r}. The presets are {', '.join(preset_names())}. "
                "Use one of them, or ModelConfig.from_file for a config.json."
            )
        return cls.from_file(path)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a `config.json`. Raises ConfigError when it is missing, not JSON, or impossible."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"Cannot read the model config {path}: {error.strerror or error}. Check the path."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}). Restore the file or write it again with save_official."
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a JSON {type(values).__name__}, but a config is an object.")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Read DeepSeek's `config.json` keys, its inference code's keys, or transformers' keys.

        Unknown keys are kept in `extra`. Raises ConfigError when a key is missing, of the wrong type or impossible.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        args = read(dict(values), set(fields) - {"extra"})
        missing = sorted(
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in args
        )
        if missing:
            raise ConfigError(f"The config lacks {', '.join(missing)}. Add them; there is no safe default.")
        return cls(**args)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model in DeepSeek's layout (with `extra` merged back).

        A network that V4's code could not run says so by another `model_type`, which only Rorqual reads.
        """
        out: dict[str, Any] = dict(self.extra)
        is_v4 = self.residual == "mhc" and self.engram is None
        out["architectures"] = ["DeepseekV4ForCausalLM" if is_v4 else "RorqualForCausalLM"]
        out["model_type"] = "deepseek_v4" if is_v4 else OWN_TYPE
        for f in dataclasses.fields(self):
            if f.name != "extra":
                out[f.name] = getattr(self, f.name)
        if self.residual == "mhc":
            del out["residual"]
        if self.cache_format == "auto":
            del out["cache_format"]
        if self.index_search == "exact":
            del out["index_search"]
        if self.engram is None:
            del out["engram"]
        else:
            out["engram"] = self.engram.to_dict()
        out["compress_ratios"] = list(self.compress_ratios)
        if self.rope_scaling is not None:
            out["rope_scaling"] = dict(self.rope_scaling)
        else:
            del out["rope_scaling"]
        return {**out, **FIXED}

    def to_transformers_dict(self) -> dict[str, Any]:
        """A `config.json` that `transformers` (`deepseek_v4`, 5.23) reads as the same network."""
        if self.residual != "mhc":
            raise ConfigError(
                f"residual is {self.residual!r}, but transformers' deepseek_v4 has hyper-connections of the mhc kind "
                "only, so it would build another network. Save with save_official, whose folder Rorqual reads."
            )
        if self.engram is not None:
            raise ConfigError(
                f"This model has Engram memories in blocks {list(self.engram.layers)}, which transformers' deepseek_v4 "
                "does not know: it would leave them out and answer differently. Save with save_official, whose folder "
                "Rorqual reads."
            )
        out = self.to_dict()
        ratios = self.compress_ratios[: self.num_hidden_layers]
        hca = sorted({r for r in ratios if r not in (0, CSA_RATIO)})
        if len(hca) > 1:
            raise ConfigError(
                f"compress_ratios holds several HCA ratios {hca}; transformers knows one for the whole model. "
                "Save in the official layout instead."
            )
        names = {0: "sliding_attention", CSA_RATIO: "compressed_sparse_attention"}
        out["layer_types"] = [names.get(r, "heavily_compressed_attention") for r in ratios]
        out["compress_rates"] = {
            "compressed_sparse_attention": CSA_RATIO,
            "heavily_compressed_attention": hca[0] if hca else 128,
        }
        out["mlp_layer_types"] = ["hash_moe" if spec.hash_routed else "moe" for spec in self.layers]
        out["partial_rotary_factor"] = self.qk_rope_head_dim / self.head_dim
        if not set(ratios) <= {0, CSA_RATIO, 128}:
            del out["compress_ratios"]  # transformers refuses other ratios there; layer_types says it all
        return out

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some settings changed, checked again."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"ModelConfig has no setting {', '.join(unknown)}. Check the spelling.")
        return dataclasses.replace(self, **changes)


def preset_names() -> list[str]:
    """Names that `ModelConfig.preset` knows, smallest model first."""
    paths = PRESET_FOLDER.glob("*.json")
    return [p.stem for p in sorted(paths, key=lambda p: (json.loads(p.read_text())["hidden_size"], p.stem))]


def _check(cfg: ModelConfig) -> None:
    """Refuse what cannot be a network, naming the field, the value and the rule."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if f.type is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{f.name} must be an integer, got {value!r}.")
        if f.type is float:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{f.name} must be a finite number, got {value!r}.")
            object.__setattr__(cfg, f.name, float(value))

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    positive = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim q_lora_rank o_groups "
        "o_lora_rank moe_intermediate_size n_routed_experts num_experts_per_tok index_n_heads index_head_dim "
        "index_topk sliding_window hc_mult hc_sinkhorn_iters max_position_embeddings"
    )
    for name in positive.split():
        need(getattr(cfg, name) >= 1, f"{name} is {getattr(cfg, name)}, but it must be at least 1.")
    for name in ("hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta", "routed_scaling_factor"):
        need(getattr(cfg, name) > 0, f"{name} is {getattr(cfg, name)}, but it must be above 0.")
    need(cfg.swiglu_limit >= 0, f"swiglu_limit is {cfg.swiglu_limit}; use 0 (no clamp) or a positive limit.")
    need(
        0 <= cfg.num_hash_layers <= cfg.num_hidden_layers,
        f"num_hash_layers is {cfg.num_hash_layers}, but it must lie between 0 and "
        f"num_hidden_layers={cfg.num_hidden_layers}.",
    )
    need(
        0 <= cfg.num_nextn_predict_layers <= 64,
        f"num_nextn_predict_layers is {cfg.num_nextn_predict_layers}; use 0 or more.",
    )
    r = cfg.qk_rope_head_dim
    need(r % 2 == 0, f"qk_rope_head_dim is {r}, but rope rotates pairs of channels; make it even.")
    need(
        r <= cfg.head_dim,
        f"qk_rope_head_dim {r} is wider than head_dim {cfg.head_dim}; a head must contain its rope part.",
    )
    need(
        cfg.num_attention_heads % cfg.o_groups == 0,
        f"num_attention_heads {cfg.num_attention_heads} does not divide into o_groups {cfg.o_groups} equal groups.",
    )
    need(
        cfg.num_experts_per_tok <= cfg.n_routed_experts,
        f"num_experts_per_tok {cfg.num_experts_per_tok} is more than n_routed_experts {cfg.n_routed_experts}.",
    )
    need(
        len(cfg.compress_ratios) >= cfg.num_hidden_layers,
        f"compress_ratios has {len(cfg.compress_ratios)} entries for num_hidden_layers={cfg.num_hidden_layers}; "
        "give one per layer (and one per MTP module).",
    )
    for i, ratio in enumerate(cfg.compress_ratios):
        need(
            isinstance(ratio, int) and not isinstance(ratio, bool) and (ratio == 0 or ratio >= 2),
            f"compress_ratios[{i}] is {ratio!r}; use 0 (window only), 4 (CSA) or a block length such as 128 (HCA).",
        )
    if any(spec.has_indexer for spec in (*cfg.layers, *cfg.mtp_layers)):
        d = cfg.index_head_dim
        need(
            d & (d - 1) == 0,
            f"index_head_dim is {d}, but the indexer's Hadamard rotation needs a power of two.",
        )
        need(
            r <= d,
            f"qk_rope_head_dim {r} is wider than index_head_dim {d}; index keys carry the same rope part.",
        )
    for spec in cfg.mtp_layers:
        need(
            spec.compress_ratio == 0,
            "An MTP module is window only in V4; the last entries of compress_ratios must be 0.",
        )
    if cfg.residual not in ("mhc", "hc", "plain"):
        raise ConfigError(f"residual is {cfg.residual!r}; use 'mhc' (V4), 'hc' (unconstrained) or 'plain' (x + f(x)).")
    need(
        cfg.residual != "plain" or cfg.hc_mult == 1,
        f"residual is 'plain', which has one stream, but hc_mult is {cfg.hc_mult}; set hc_mult to 1.",
    )
    if cfg.activation_rounding not in ("none", "v4", "v4-inputs"):
        raise ConfigError(f"activation_rounding is {cfg.activation_rounding!r}; use 'none', 'v4' or 'v4-inputs'.")
    if cfg.cache_format not in CACHE_FORMATS:
        raise ConfigError(f"cache_format is {cfg.cache_format!r}; use one of {', '.join(CACHE_FORMATS)}.")
    if cfg.index_search not in INDEX_SEARCHES:
        raise ConfigError(f"index_search is {cfg.index_search!r}; use one of {', '.join(INDEX_SEARCHES)}.")
    need(
        cfg.cache_format in ("auto", "exact") or cfg.index_head_dim % 2 == 0,
        f"cache_format is {cfg.cache_format!r}, but index_head_dim {cfg.index_head_dim} is odd and two FP4 channels "
        "share a byte; make it even, or use 'exact'.",
    )
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(cfg, name)
        need(0 <= value < cfg.vocab_size, f"{name} is {value}, outside the vocabulary of {cfg.vocab_size}; correct it.")
    need(cfg.initializer_range >= 0, f"initializer_range is {cfg.initializer_range}; a spread cannot be negative.")
    if cfg.torch_dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"torch_dtype is {cfg.torch_dtype!r}; use float32, bfloat16 or float16.")
    if cfg.rope_scaling is not None:
        _check_yarn(cfg)
    if cfg.engram is not None:
        check_engram(cfg.engram, cfg.num_hidden_layers, cfg.vocab_size)


def _check_yarn(cfg: ModelConfig) -> None:
    scaling = cfg.rope_scaling
    if not isinstance(scaling, Mapping) or scaling.get("type") != "yarn":
        kind = scaling.get("type") if isinstance(scaling, Mapping) else scaling
        raise ConfigError(
            f"rope_scaling.type is {kind!r}; V4's compressed layers use yarn or nothing. Remove or correct it."
        )
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    missing = [key for key in keys if key not in scaling]
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}, without which YaRN has no meaning. Add them.")
    for key in keys:
        value = scaling[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"rope_scaling.{key} is {value!r}; it must be a finite number above 0.")
    if cfg.compress_rope_theta <= 1:
        raise ConfigError(f"compress_rope_theta is {cfg.compress_rope_theta}; with YaRN it must be above 1.")
