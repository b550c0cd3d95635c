"""What V4 is compared with: DeepSeek-V3.2, and a V4 network whose attention is grouped-query attention.

V3.2 (multi-head latent attention with a lightning indexer over all tokens), per layer and token:

    cache    a latent of 512 in FP8 with a scale of 4 bytes per 128, 64 rope channels in bf16: 656 bytes;
             an index key of 128 in FP8 with a scale of 4: 132 bytes
    core     2 H (latent + rope) scores and 2 H latent values for each of at most `index_topk` keys
    index    2 J c' for every token, fp8

Its attention is counted in the absorbed form, in which it decodes. GQA-8 is no released model: it has the V4 network's
layers, heads (of 128 channels) and experts, and reads all keys; only its cache is compared in the V4 report.
Source: V3.2's config.json and inference code; V4 report, efficiency.
"""

import dataclasses
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig
from rorqual.planner.flops import mean_min
from rorqual.planner.tensors import Inventory, inventory
from rorqual.planner.work import Experts, Operations, WeightBytes, Work, count_products, experts_of, weight_bytes

FP8_SCALE_BYTES = 4 / 128**2
"""An fp32 scale per block of 128 x 128, in bytes a weight."""

ATTENTION = (
    "wq_a", "wq_b", "wkv", "wo_a", "wo_b", "attention_norms_sinks", "compressor", "compressor_ape_norm",
    "indexer_wq_b", "indexer_weights_proj", "indexer_compressor",
)  # fmt: skip
"""Components of a V4 network that GQA-8 has not."""


@cache
def baseline_settings() -> dict[str, dict[str, Any]]:
    """`baselines.toml`."""
    return tomllib.loads(Path(__file__).with_name("baselines.toml").read_text(encoding="utf-8"))


class V32:
    """DeepSeek-V3.2, or a network of its kind."""

    def __init__(self, values: dict[str, Any] | None = None, name: str = "DeepSeek-V3.2") -> None:
        c = self._settings = baseline_settings()["v3_2"] if values is None else values
        self.name = name
        d, heads, latent, rope = (
            c[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim")
        )
        self._layers = c["num_hidden_layers"]
        sparse = self._layers - c["first_k_dense_replace"]
        self.experts = Experts(sparse, c["n_routed_experts"], c["num_experts_per_tok"], d, c["moe_intermediate_size"])
        query = d * c["q_lora_rank"] + c["q_lora_rank"] * heads * (c["qk_nope_head_dim"] + rope)
        keys = d * (latent + rope) + latent * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
        index = c["q_lora_rank"] * c["index_n_heads"] * c["index_head_dim"] + d * c["index_head_dim"]
        attention = query + keys + heads * c["v_head_dim"] * d + index
        self._expert = 3 * d * c["moe_intermediate_size"]
        dense = c["first_k_dense_replace"] * 3 * d * c["intermediate_size"]
        self._fp8_always = self._layers * attention + dense + sparse * c["n_shared_experts"] * self._expert
        self._bf16 = self._layers * d * c["index_n_heads"] + sparse * d * c["n_routed_experts"]
        self._head = c["vocab_size"] * d
        self.weights = self._weights(attention)

    def decode(self, context: int) -> Work:
        """See `Network`."""
        return self._work(min(context, self._settings["index_topk"]), context)

    def prefill(self, num_tokens: int) -> Work:
        """See `Network`."""
        return self._work(mean_min(num_tokens, self._settings["index_topk"]), (num_tokens + 1) / 2).without("head")

    def cache_bytes(self, context: int) -> int:
        """See `Network`."""
        return self._layers * context * (self._entry + self._index_key)

    def cache_read(self, context: int) -> int:
        """See `Network`."""
        return self._layers * (min(context, self._settings["index_topk"]) * self._entry + context * self._index_key)

    def cache_per_token(self) -> float:
        """See `Network`."""
        return self._layers * (self._entry + self._index_key)

    @property
    def _entry(self) -> int:
        latent = self._settings["kv_lora_rank"]
        return latent + latent // 128 * 4 + 2 * self._settings["qk_rope_head_dim"]

    @property
    def _index_key(self) -> int:
        return self._settings["index_head_dim"] + 4

    def _work(self, keys: float, scored: float) -> Work:
        c = self._settings
        per_key = 2 * c["num_attention_heads"] * (2 * c["kv_lora_rank"] + c["qk_rope_head_dim"])
        chosen = self.experts.layers * self.experts.chosen * self._expert
        return Work(
            (
                Operations("linear", "fp8", 2.0 * (self._fp8_always + chosen)),
                Operations("linear", "bf16", 2.0 * self._bf16),
                Operations("head", "bf16", 2.0 * self._head),
                Operations("core", "bf16", float(self._layers * per_key * keys)),
                Operations("index", "fp8", 2.0 * self._layers * c["index_n_heads"] * c["index_head_dim"] * scored),
            )
        )

    def _weights(self, attention: int) -> WeightBytes:
        """Norms and biases, a few megabytes, are left out."""
        packed = 1 + FP8_SCALE_BYTES
        routed = self.experts.layers * self.experts.count * self._expert
        d, modules = self.experts.hidden_size, self._settings["num_nextn_predict_layers"]
        shared = self._settings["n_shared_experts"]
        drafting = modules * (attention + 2 * d * d + (self.experts.count + shared) * self._expert)
        return WeightBytes(
            always=round(self._fp8_always * packed) + 2 * (self._bf16 + self._head),
            routed=round(routed * packed),
            lookup=2 * self._head,
            drafting=round(drafting * packed),
        )


class GQA8:
    """A V4 network with grouped-query attention in every layer; its matrices are stored like those they replace."""

    def __init__(self, config: ModelConfig, stored: Inventory | None = None) -> None:
        c = baseline_settings()["gqa_8"]
        stored = inventory(config, "official") if stored is None else stored
        self.name, self.experts = f"GQA-{c['num_key_value_heads']}", experts_of(config)
        self._layers, self._heads, self._width = config.num_hidden_layers, config.num_attention_heads, c["head_dim"]
        self._row = 2 * c["num_key_value_heads"] * c["head_dim"] * c["bytes_per_number"]
        matrices = self._layers * config.hidden_size * self._width * 2 * (self._heads + c["num_key_value_heads"])
        size = {"bf16": 2.0, "fp32": 4.0}.get(stored.weights, 1 + FP8_SCALE_BYTES)
        rest = weight_bytes(stored, left_out=ATTENTION)
        self.weights = dataclasses.replace(rest, always=rest.always + round(matrices * size))
        products = count_products(stored, config, left_out=ATTENTION)
        self._products = (*products, Operations("linear", "fp8" if size < 2 else "bf16", 2.0 * matrices))

    def decode(self, context: int) -> Work:
        """See `Network`."""
        return self._work(context)

    def prefill(self, num_tokens: int) -> Work:
        """See `Network`."""
        return self._work((num_tokens + 1) / 2).without("head")

    def cache_bytes(self, context: int) -> int:
        """See `Network`."""
        return self._layers * self._row * context

    def cache_read(self, context: int) -> int:
        """See `Network`."""
        return self.cache_bytes(context)

    def cache_per_token(self) -> float:
        """See `Network`."""
        return self._layers * self._row

    def _work(self, keys: float) -> Work:
        core = 4.0 * self._layers * self._heads * self._width * keys
        return Work((*self._products, Operations("core", "bf16", core)))
