"""A model folder for tests of post-training: a tiny network, one token a byte, in the official layout."""

from pathlib import Path

import torch
from mock_model import byte_tokenizer

from rorqual.checkpoint import save_official
from rorqual.config import ModelConfig
from rorqual.model import Transformer

CONFIG = ModelConfig.preset("minke").replace(
    vocab_size=byte_tokenizer().vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    compress_ratios=(0, 4, 0),
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_lora_rank=16,
    n_routed_experts=4,
    moe_intermediate_size=32,
    sliding_window=8,
    index_topk=2,
    index_n_heads=2,
    index_head_dim=16,
    num_hash_layers=1,
)


def little_model(folder: Path, seed: int = 0) -> Path:
    """Write a model with random weights into `folder`."""
    save_official(Transformer(CONFIG, seed=seed), folder, dtype=torch.float32)
    byte_tokenizer().save(folder)
    return folder
