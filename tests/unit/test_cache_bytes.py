"""The planner's cache formula against what an engine's states really hold, to the byte, at the released models' sizes.

The networks here have everything of V4-Flash and V4-Pro that decides what a sequence keeps: widths of heads, rope,
entries and index keys, window and ratios. What does not (hidden size, heads, experts, vocabulary) is small. The quick
tests have the first layers of the schedule, one of each kind among them; the slow ones all of it, or real attention.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mock_model import byte_tokenizer

from rorqual.config import ModelConfig
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.model import Transformer
from rorqual.model.segments import Segment
from rorqual.planner import own_rows, paged_bytes, released_rows

TOKENIZER = byte_tokenizer()
NARROW: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size, "hidden_size": 64, "num_attention_heads": 2, "o_groups": 2, "o_lora_rank": 16,
    "q_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 2, "num_experts_per_tok": 1, "index_n_heads": 2,
    "num_hash_layers": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
LENGTHS = (1, 3, 4, 127, 128, 129, 258, 515)  # all residues of 4, both sides of 128
PARTS = ("window", "entries", "index_keys", "pending")


class Weighed(Transformer):
    """Notes what each state holds after a step of the engine: its length, bytes by part, and bytes of filled rows."""

    seen: dict[int, tuple[dict[str, int], int]]

    def next_scores(self, segments: Sequence[Segment], *rest: Any) -> Any:
        scores = super().next_scores(segments, *rest)
        for segment in segments:
            state, filled = segment.state, 0
            for layer, spec in zip(state.layers, self.cfg.layers, strict=True):
                for name in ("entries", "index_keys"):
                    rows = layer.contents().get(name)
                    if rows is not None:
                        filled += rows[:, : state.lengths[0] // spec.compress_ratio].nbytes
            self.seen[state.lengths[0]] = state.nbytes(), filled
        return scores


def first_layers(preset: str, count: int = 4, **changes: Any) -> ModelConfig:
    cfg = ModelConfig.preset(preset)
    return cfg.replace(num_hidden_layers=count, compress_ratios=cfg.compress_ratios[:count], **changes)


def weighed(cfg: ModelConfig, dtype: torch.dtype) -> Weighed:
    torch.manual_seed(0)
    model = Transformer(cfg).to(dtype).eval()
    model.__class__ = Weighed
    assert isinstance(model, Weighed)
    model.seen = {}
    return model


def weigh(model: Weighed, lengths: Sequence[int], cache: PrefixCache | None = None) -> None:
    own = SamplingParams(temperature=0, max_tokens=1)
    with Engine(model, TOKENIZER, chunk=1024, prefix_cache=cache) as engine:
        for length in lengths:
            engine.submit([3 + i % 250 for i in range(length)], own).result(300)


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
@pytest.mark.parametrize(
    ("dtype", "cache_format", "entry", "key"),
    [(torch.float32, "exact", 2048, 512), (torch.bfloat16, "exact", 1024, 256), (torch.bfloat16, "fp8", 584, 68)],
    ids=["fp32", "bf16", "packed"],
)
def test_a_live_state_holds_what_the_formula_says(
    preset: str, dtype: torch.dtype, cache_format: str, entry: int, key: int, one_thread: None
) -> None:
    real = first_layers(preset, cache_format=cache_format)
    rows = own_rows(real, dtype)
    assert (rows.entry, rows.index_key) == (entry, key)
    compare(weighed(real.replace(**NARROW), dtype), real, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
def test_all_layers_of_the_schedule(preset: str, one_thread: None) -> None:
    real = ModelConfig.preset(preset)
    compare(weighed(real.replace(**NARROW), torch.bfloat16), real, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
def test_real_attention(preset: str) -> None:
    """Hidden size, heads and projections as released, in the second to fourth layer: window (or HCA), CSA, HCA."""
    small = ("vocab_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
    cfg = ModelConfig.preset(preset)
    cfg = cfg.replace(
        num_hidden_layers=3, compress_ratios=cfg.compress_ratios[1:4], num_nextn_predict_layers=0,
        **{name: NARROW[name] for name in small},
    )  # fmt: skip
    compare(weighed(cfg, torch.bfloat16), cfg, (131, 258))


def compare(model: Weighed, real: ModelConfig, lengths: Sequence[int]) -> None:
    """States of `model` after prompts of these lengths against the formula on `real`."""
    rows = own_rows(real, model.reference.dtype)
    weigh(model, lengths)
    for length in lengths:
        held, filled = model.seen[length]
        expected = rows.sequence(real, length)
        assert (held["window"], held["pending"]) == (expected.window, expected.pending), length
        assert filled == expected.growing, length
        assert held["total"] - held["entries"] - held["index_keys"] == expected.fixed, length


@pytest.mark.parametrize("preset", ["v4-flash", "v4-pro"])
def test_pages_hold_whole_blocks_of_it(preset: str, one_thread: None) -> None:
    real = first_layers(preset)
    model = weighed(real.replace(**NARROW), torch.bfloat16)
    weigh(model, LENGTHS, PrefixCache(model, memory_bytes=1 << 24, running_tokens=4096))
    for length in LENGTHS:
        held, filled = model.seen[length]
        expected = own_rows(real).sequence(real, length)
        assert held["entries"] + held["index_keys"] == paged_bytes(real, length), length
        assert filled == expected.growing
        assert held["total"] == expected.fixed + paged_bytes(real, length)


def test_engram_counts_too() -> None:
    cfg = ModelConfig.preset("minke-engram")
    state = Transformer(cfg).new_state(1, rewind=17)
    held, expected = state.nbytes(), own_rows(cfg, torch.float32, rewind=17).sequence(cfg, 0)
    assert {part: held[part] for part in (*PARTS, "engram")} == {
        part: getattr(expected, part) for part in (*PARTS, "engram")
    }
    assert expected.engram > 0


@pytest.mark.parametrize(
    ("preset", "ring", "pending"), [("v4-flash", 3_214_336, 12_206_080), ("v4-pro", 4_559_872, 18_710_528)]
)
def test_the_released_cache(preset: str, ring: int, pending: int) -> None:
    """Rings of 128 rows of 584 bytes; open blocks as in the architecture document's table of states."""
    cfg = ModelConfig.preset(preset)
    rows = released_rows(cfg)
    kinds = [spec.kind for spec in cfg.layers]
    assert ring == 128 * 584 * len(kinds)
    assert pending == kinds.count("csa") * (65_536 + 16_384) + kinds.count("hca") * 524_288
    found = rows.sequence(cfg, 0)
    assert (found.window, found.pending, found.growing) == (ring, pending, 0)
    assert rows.bytes_per_token(cfg) == 163 * kinds.count("csa") + 4.5625 * kinds.count("hca")
    long = 1 << 20
    assert rows.sequence(cfg, long).growing == rows.bytes_per_token(cfg) * long
    # one token reads the window, the picked entries of a CSA layer, all of an HCA layer's, and every index key
    picked = kinds.count("csa") * (cfg.index_topk * 584 + long // 4 * 68) + kinds.count("hca") * (long // 128) * 584
    assert rows.read(cfg, long) == ring + picked
