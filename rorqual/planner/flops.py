"""Floating-point operations of a forward pass, per token: what "equal compute" means when two models are compared.

    weights     2 for every activated parameter (the head counts, the embedding is a lookup)
    attention   4 H c for every key a query reads: window, then the picked (CSA) or all (HCA) visible entries
    index       2 J c' for every index key that an indexer scores
    mixing      what the residual path does to the streams besides its projections

Keys are counted exactly: the mean over the positions of one document that fills the row. Packed rows of shorter
documents read fewer, in every arm of a comparison alike. The backward pass is twice the forward pass. Left out:
element-wise work outside the residual path (norms, rope, softmax, SwiGLU), which is below a percent.

H heads, c head width, J index heads, c' their width, N streams, D hidden.
"""

from dataclasses import dataclass

from rorqual.config import LayerSpec, ModelConfig
from rorqual.model import Transformer
from rorqual.planner.parameters import ParameterCount, build_on_meta, count_model


@dataclass(frozen=True)
class ForwardFlops:
    """Operations per token of one forward pass over rows of `seq_len` tokens, by part."""

    seq_len: int
    weights: float
    attention: float
    index: float
    mixing: float
    mtp: float
    """All of the MTP modules, their pass through the head included; training pays for it, `total` leaves it out."""

    @property
    def total(self) -> float:
        """The network that is used afterwards: without MTP."""
        return self.weights + self.attention + self.index + self.mixing

    @property
    def training(self) -> float:
        """What a training step computes forward: with MTP."""
        return self.total + self.mtp


def forward_flops(config: ModelConfig, seq_len: int, model: Transformer | None = None) -> ForwardFlops:
    """Count `config` for documents of `seq_len` tokens; `model` saves building it again on the meta device.

    Raises: ConfigError from an impossible configuration.
    """
    model = build_on_meta(config) if model is None else model
    count = count_model(model, config)
    keys = [attention_keys(config, spec, seq_len) for spec in config.layers]
    indexed = sum(mean_entries(seq_len, spec.compress_ratio, seq_len) for spec in config.layers if spec.has_indexer)
    return ForwardFlops(
        seq_len,
        weights=2.0 * count.activated,
        attention=per_key_flops(config) * sum(keys),
        index=2.0 * config.index_n_heads * config.index_head_dim * indexed,
        mixing=mixing_flops(config),
        mtp=_mtp(config, count, model, seq_len),
    )


def attention_keys(config: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    """Keys that a query of this layer reads, mean over the positions of a document of `seq_len` tokens."""
    window = mean_min(seq_len, config.sliding_window)
    if not spec.compress_ratio:
        return window
    limit = config.index_topk if spec.has_indexer else seq_len
    return window + mean_entries(seq_len, spec.compress_ratio, limit)


def per_key_flops(config: ModelConfig) -> float:
    """Scores and weighted sum over one key."""
    return 4.0 * config.num_attention_heads * config.head_dim


def mixing_flops(config: ModelConfig) -> float:
    """What the residual path of the whole trunk does to a token's streams."""
    return config.num_hidden_layers * 2 * _mix(config) + _collapse(config)


def mean_min(seq_len: int, limit: int) -> float:
    """Mean of min(t + 1, limit) over t < seq_len."""
    short = min(seq_len, limit)
    return (short * (short + 1) / 2 + (seq_len - short) * limit) / seq_len


def mean_entries(seq_len: int, ratio: int, limit: int) -> float:
    """Mean of min(floor((t + 1) / ratio), limit) over t: entries are visible from the last token of their block on."""
    full = min(seq_len // ratio, limit)  # `full` entries are visible from the token numbered ratio * full on
    return (ratio * full * (full - 1) / 2 + (seq_len - ratio * full + 1) * full) / seq_len


def _mix(config: ModelConfig) -> float:
    """One sublayer's residual path without the 2 operations a weight that `weights` counts."""
    n, d = config.hc_mult, config.hidden_size
    if config.residual == "plain":
        return d
    apply = 2 * n * d + 2 * n * d + 2 * n * n * d  # collapse, spread, mix
    if config.residual == "hc":  # its projection runs once a stream, but its weights are counted once
        return apply + 2 * (n - 1) * (n + 2) * d
    return apply + 4 * n * n * config.hc_sinkhorn_iters  # a sum and a division an element, rows and columns


def _collapse(config: ModelConfig) -> float:
    """The head's collapse of the streams."""
    return 0.0 if config.residual == "plain" else 2.0 * config.hc_mult * config.hidden_size


def _mtp(config: ModelConfig, count: ParameterCount, model: Transformer, seq_len: int) -> float:
    """All MTP modules: activated weights, window attention, mixing, and the shared head once more each."""
    total = 0.0
    for index, spec in enumerate(config.mtp_layers):
        sizes = {name: p.numel() for name, p in model.mtp[index].named_parameters()}
        routed = sum(size for name, size in sizes.items() if ".experts." in name)
        chosen = routed * config.num_experts_per_tok // config.n_routed_experts
        weights = sum(sizes.values()) - routed + chosen + count.by_component["head"]
        weights += (config.hc_mult - 1) * config.hidden_size**2  # h_proj runs on every stream
        total += 2.0 * weights + per_key_flops(config) * attention_keys(config, spec, seq_len)
        total += 2 * _mix(config) + _collapse(config)
    return total
