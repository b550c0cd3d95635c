"""The toy model of the conformance vectors: its configuration, its weights made from a hash, and what must
come out.

Source: the architecture document, appendix A (weights A.1, Sinkhorn A.2, scalars A.3) and section 2.2
(YaRN). The numbers were produced there by DeepSeek's own inference code in fp32 with the quantisers off; here
they are only data. Nothing in this file knows Rorqual: `weight` works from a tensor's official name, so any
implementation can be filled with it.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Vector = tuple[float, ...]

TOY: dict[str, object] = {
    "model_type": "deepseek_v4",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 8, 4, 0],
    "num_hash_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 72,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "sliding_window": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.5,
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 3,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "max_position_embeddings": 1024,
}

TOKENS: list[int] = [(7 * t * t + 3 * t + 5) % 64 for t in range(37)]


def hash_units(name: str, count: int) -> npt.NDArray[np.float64]:
    """`count` values in [-1, 1), a function of the tensor's name only (fp64)."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return 2.0 * x.astype(np.float64) / 2.0**32 - 1.0


def hash_table(rows: int, picks: int, num_experts: int = 8) -> npt.NDArray[np.int64]:
    """`tid2eid` of the toy: entry [a, j] is (7a + 3j + a // 8) mod experts."""
    a = np.arange(rows, dtype=np.int64)[:, None]
    return (7 * a + 3 * np.arange(picks, dtype=np.int64)[None, :] + a // 8) % num_experts


def weight(name: str, shape: tuple[int, ...], *, seed: str = "") -> npt.NDArray[np.float32]:
    """The tensor with this official name and shape, rounded to fp32; another `seed` gives another set of
    weights.
    """
    v = hash_units(seed + name, math.prod(shape)).reshape(shape)
    parts = name.split(".")
    if len(parts) > 1 and "norm" in parts[-2]:
        v = 1.0 + 0.2 * v
    elif parts[-1].startswith("hc_") and parts[-1].endswith("_fn"):
        v = 0.1 * v
    elif parts[-1].startswith("hc_") and parts[-1].endswith("_scale"):
        v = 1.0 + 0.5 * v
    elif parts[-1] in ("attn_sink", "ape") or (parts[-1].startswith("hc_") and parts[-1].endswith("_base")):
        v = 0.5 * v
    elif name.endswith("gate.bias"):
        v = 0.2 * v
    elif name != "embed.weight":
        v = v * math.sqrt(3.0 / shape[-1])
    return v.astype(np.float32)


def weights(
    shapes: Mapping[str, tuple[int, ...]], *, seed: str = "", num_experts: int = 8
) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]]:
    """All tensors of a model whose routed experts are stacked (`layers.N.ffn.experts.w1` [E, I, D]), filled
    by name.

    The hash is seeded by each expert's own official name (`layers.N.ffn.experts.e.w1.weight`).
    """
    found: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]] = {}
    for name, shape in shapes.items():
        if name.endswith("tid2eid"):
            found[name] = hash_table(shape[0], shape[1], num_experts)
        elif ".ffn.experts." in name:
            prefix, matrix = name.rsplit(".", 1)
            one = [weight(f"{prefix}.{e}.{matrix}.weight", shape[1:], seed=seed) for e in range(shape[0])]
            found[name] = np.stack(one)
        else:
            found[name] = weight(name, shape, seed=seed)
    return found


# First values of four tensors, to check the generator itself.
WEIGHT_STARTS: dict[str, tuple[tuple[int, ...], Vector]] = {
    "embed.weight": ((64, 32), (-0.2016419, -0.4598564, 0.3124548)),
    "layers.1.attn.wq_a.weight": ((16, 32), (-0.0266609, 0.0615938, 0.1247403)),
    "layers.1.attn.compressor.ape": ((4, 144), (0.3838111, -0.1803207, -0.2490239)),
    "layers.2.hc_ffn_scale": ((3,), (0.5349491, 1.3640496, 0.8077267)),
}

# Token position -> (first six logits, argmax, L2 norm of all 64).
LOGITS: dict[int, tuple[Vector, int, float]] = {
    0: ((0.0480, -0.1255, -1.2539, -1.5900, 0.8793, 0.2095), 27, 7.4679),
    3: ((-0.2135, -0.0431, 2.3595, -0.4096, 0.4664, 0.1759), 18, 7.9367),
    4: ((-0.2753, 0.9195, 1.2445, -1.8241, -0.5991, 0.8503), 42, 8.0537),
    7: ((-0.7151, 3.4312, -0.8180, -0.8444, -1.4201, 0.3437), 1, 8.2980),
    15: ((1.0915, -1.5540, 0.2838, 1.8197, 2.1149, 1.2925), 44, 8.7998),
    20: ((0.2136, 1.9319, 0.2755, 2.1278, 2.0905, -0.3314), 16, 8.3225),
    31: ((-0.7090, 1.1784, -0.5987, -0.7875, 1.1374, 2.4960), 15, 8.1118),
    36: ((-0.0503, 2.5919, -0.0838, 1.7354, 0.0909, 2.4480), 1, 7.6127),
}

ARGMAXES: list[int] = [
    27, 36, 1, 18, 42, 51, 44, 1, 9, 9, 50, 10, 10,
    25, 25, 44, 3, 15, 60, 59, 16, 44, 19, 3, 2, 1,
    6, 8, 31, 4, 63, 15, 5, 6, 44, 44, 1,
]  # fmt: skip

# (captured name, row): first four channels. A row of a stream capture is (token, stream).
INTERMEDIATES: list[tuple[str, tuple[int, ...], Vector]] = [
    ("layers.0.attn", (36,), (0.15755, -0.27382, 0.93118, -0.27561)),
    ("layers.0.attn", (10,), (0.26193, 0.05081, 0.50145, -0.11910)),
    ("layers.0.ffn", (36,), (0.30453, 0.00443, -0.16175, 0.24647)),
    ("layers.0.streams", (36, 0), (1.33609, 0.08470, 1.41263, -0.89347)),
    ("layers.0.streams", (36, 3), (1.10617, 0.13006, 1.35577, -1.00846)),
    ("layers.1.attn.entries", (0,), (-0.62317, -0.10259, -0.65606, 0.37076)),
    ("layers.1.attn.entries", (1,), (0.45075, 0.57671, 0.61447, -0.02580)),
    ("layers.1.attn.index_entries", (0,), (0.25940, -1.29428, 0.93722, -0.74210)),
    ("layers.1.attn.index_entries", (1,), (0.99939, 0.51582, -1.13390, 2.25812)),
    ("layers.1.attn", (36,), (-0.16094, 0.09502, -0.18280, -0.22722)),
    ("layers.1.ffn", (36,), (0.13508, -0.24399, 0.11725, -0.09874)),
    ("layers.2.attn.entries", (0,), (-0.29901, 1.24531, -0.25612, 1.16080)),
    ("layers.2.attn", (36,), (0.18680, 0.05458, -0.05367, -0.17739)),
    ("layers.3.streams", (36, 0), (2.29758, 0.61713, 2.65887, -1.48831)),
]
ENTRY_1_LAST_FOUR: Vector = (-1.72079, -1.56696, 0.85825, -1.23661)

# Layer 1's indexer picks by query position.
PICKS: dict[int, set[int]] = {
    3: {0},
    10: {0, 1},
    15: {0, 1, 3},
    20: {0, 1, 3},
    27: {0, 2, 4},
    31: {0, 4, 6},
    36: {1, 4, 8},
}

# MTP logits of row 35 (streams of rows 0..35, tokens 1..36).
MTP_LOGITS: Vector = (0.6626, -1.1115, 1.2617, 0.7834, 0.5137, 0.2335)
MTP_ARGMAX = 41
MTP_L2 = 8.0663

# A.2: pre, post and comb for mix_k = 2 sin(1.7 k), base_k = cos k, scale (1, 0.5, 2).
SINKHORN_PRE: Vector = (0.731060, 0.925783, 0.283488, 0.055117)
SINKHORN_POST: Vector = (0.920404, 1.493801, 1.129418, 1.067779)
SINKHORN_COMB: tuple[Vector, ...] = (
    (0.245074, 0.687231, 0.057665, 0.009989),
    (0.608680, 0.295202, 0.077406, 0.018680),
    (0.063140, 0.013675, 0.350444, 0.572777),
    (0.083106, 0.003890, 0.514484, 0.398553),
)
SINKHORN_ROW_SUMS: Vector = (0.999959, 0.999968, 1.000036, 1.000033)

# A.3
SQRT_SOFTPLUS: dict[float, float] = {
    -20.0: 4.54e-5,
    -5.0: 0.0819472,
    -1.0: 0.5596979,
    0.0: 0.8325546,
    1.0: 1.1459763,
    5.0: 2.2375691,
    25.0: 5.0,
}
HADAMARD_ROW_3: Vector = (1, -1, -1, 1, 1, -1, -1, 1)

# Section 2.2: pair index -> frequency. The first table is the released models', the others are the toy's.
YARN_RELEASED: dict[int, float] = {
    0: 1.0,
    1: 0.687656045,
    8: 0.0500000007,
    15: 3.63553851e-3,
    16: 2.26562493e-3,
    17: 1.39680132e-3,
    20: 2.96977785e-4,
    24: 1.95312532e-5,
    25: 5.37231244e-6,
    31: 5.68052940e-7,
}
YARN_TOY: Vector = (1.0, 3.125e-3, 1.5625e-4, 7.8125e-6)
PLAIN_TOY: Vector = (1.0, 0.1, 0.01, 0.001)
