"""Parameter counts: the published figures by computation, and changes that follow the configuration."""

import pytest

from rorqual.config import ModelConfig
from rorqual.planner import count_parameters
from rorqual.planner.parameters import component

# table of the architecture document, section 1.4
PUBLISHED = {
    "v4-flash": {
        "total": 284_332_240_471,
        "activated": 13_270_101_591,
        "with_mtp": 290_942_289_362,
        "activated_routed_experts": 6_492_782_592,
    },
    "v4-pro": {
        "total": 1_572_997_201_763,
        "activated": 48_852_402_019,
        "with_mtp": 1_598_837_347_742,
        "activated_routed_experts": 24_178_065_408,
    },
}
FLASH_COMPONENTS = {
    "embedding": 529_530_880,
    "head": 529_530_880,
    "wq_a": 180_355_072,
    "wq_b": 1_442_840_576,
    "wkv": 90_177_536,
    "wo_a": 1_442_840_576,
    "wo_b": 1_442_840_576,
    "attention_norms_sinks": 68_800,
    "compressor": 260_046_848,
    "compressor_ape_norm": 1_417_728,
    "indexer_wq_b": 176_160_768,
    "indexer_weights_proj": 5_505_024,
    "indexer_compressor": 44_064_384,
    "router": 45_099_008,
    "routed_experts": 277_025_390_592,
    "shared_expert": 1_082_130_432,
    "hyper_connections": 33_818_898,
    "norms_hc_head": 421_893,
    "mtp": 6_610_048_891,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_totals(preset: str):
    count = count_parameters(ModelConfig.preset(preset))
    assert {name: getattr(count, name) for name in PUBLISHED[preset]} == PUBLISHED[preset]


def test_published_components():
    assert count_parameters(ModelConfig.preset("v4-flash")).by_component == FLASH_COMPONENTS


def test_a_changed_config_changes_the_counts_rightly():
    flash = ModelConfig.preset("v4-flash")
    before, expert = count_parameters(flash), 3 * flash.hidden_size * flash.moe_intermediate_size
    more = count_parameters(flash.replace(num_experts_per_tok=7))
    assert more.activated - before.activated == 43 * expert and more.total == before.total
    bigger = count_parameters(flash.replace(vocab_size=flash.vocab_size + 100))
    assert bigger.total - before.total == 2 * 100 * flash.hidden_size
    assert bigger.activated - before.activated == 100 * flash.hidden_size  # the head only
    none = count_parameters(flash.replace(num_nextn_predict_layers=0))
    assert none.with_mtp == none.total == before.total and "mtp" not in none.by_component
    learned = count_parameters(flash.replace(num_hash_layers=0))
    assert learned.total - before.total == 3 * flash.n_routed_experts  # three more router biases


def test_components_add_up_and_unknown_tensors_are_noticed():
    count = count_parameters(ModelConfig.preset("minke"))
    assert sum(n for name, n in count.by_component.items() if name != "mtp") == count.total
    with pytest.raises(AssertionError, match="layers.0.attn.surprise belongs to no component"):
        component("layers.0.attn.surprise")
