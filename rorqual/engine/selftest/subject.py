"""What exactness is tried on: a small random network with every kind of layer, built so that rounding shows.

In a trained model the likeliest token leads by far, and a difference in the last bits of the logits changes nothing one
could see. Here the output head's rows come in pairs that differ in the sixth digit: whichever of a pair leads does so
by about as much as fp32 rounds, so a sum in another order soon gives another token, and from there another text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.model import Transformer
from rorqual.model.packed_weights import pack_weights

TWIN = {torch.float32: 3e-6, torch.bfloat16: 2e-3}
"""How far the head's rows of a pair differ, relative to their size: about what the precision keeps."""


class IdsOnly:
    """A tokenizer for engines that are asked for ids alone: no text, and no end token."""

    eos_token_id = -1
    control_token_ids: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("there is no text here; give token ids")

    def stream_decoder(self) -> IdsOnly:
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def small_config(**changes: Any) -> ModelConfig:
    """Window, CSA, HCA (128 tokens an entry, as in V4) and CSA again, with a hash-routed layer and an MTP module."""
    values: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 48, "num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4],
        "num_hash_layers": 1, "num_attention_heads": 4, "head_dim": 24, "qk_rope_head_dim": 8, "q_lora_rank": 24,
        "o_groups": 2, "o_lora_rank": 16, "sliding_window": 12, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "routed_scaling_factor": 1.5, "swiglu_limit": 1.0, "index_n_heads": 4,
        "index_head_dim": 16, "index_topk": 5, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "hc_mult": 4,
        "num_nextn_predict_layers": 1, "max_position_embeddings": 16384, "torch_dtype": "float32",
    }  # fmt: skip
    return ModelConfig.from_dict({**values, **changes})


@torch.no_grad()
def high_entropy(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A network of random weights in which every part matters, with the head's rows in pairs of near twins."""
    model = Transformer(cfg, seed=None).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "tid2eid":
            order = torch.rand((tensor.shape[0], cfg.n_routed_experts), generator=draw).argsort(dim=1)
            tensor.copy_(order[:, : tensor.shape[1]])
        elif tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=draw)
            if "norm" in name.split(".")[-2:][0]:
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() == 1 or leaf == "ape":
                tensor.copy_(0.5 * noise + (1.0 if leaf.endswith("_scale") else 0.0))
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    model.to(dtype)
    make_twins(model, draw)
    return model


@torch.no_grad()
def small_network(seed: int, dtype: torch.dtype, weights: str | None, cache_format: str | None) -> Transformer:
    """`high_entropy` of `small_config`, kept and computed as `rorqual.load` would with these choices."""
    model = high_entropy(small_config(cache_format=cache_format or "auto"), seed, dtype)
    if weights is not None:
        pack_weights(model, weights)
    return model


@torch.no_grad()
def make_twins(model: Transformer, draw: torch.Generator) -> None:
    """Make every second row of the head a near copy of the row before it."""
    head = model.head.weight
    even = head[0::2][: len(head) // 2].float()
    noise = torch.randn(even.shape, generator=draw)
    head[1::2] = (even * (1 + TWIN[head.dtype] * noise)).to(head.dtype)


@torch.inference_mode()
def plain_ids(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation by the model alone: one sequence, the prompt in one call, then token by token."""
    return [token for token, _ in plain_steps(model, prompt, count)]


def plain_steps(model: Transformer, prompt: Sequence[int], count: int) -> Iterator[tuple[int, Tensor]]:
    """Tokens and the logits [V] that they were chosen from, as `plain_ids`."""
    state, new = model.new_state(), list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            logits = model.logits(model.final_hidden(model.forward_streams(torch.tensor([new]), state=state)[:, -1:]))
        new = [int(logits[0, -1].argmax())]
        yield new[0], logits[0, -1]
