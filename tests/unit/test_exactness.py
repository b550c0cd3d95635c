"""The declared exactness: read off what runs, and every operation that runs is looked at."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "property"))
from mock_model import HashModel, byte_tokenizer
from small_models import build, config, packable_config, some_tokens

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.exactness import ENGRAM, chosen_operations, examine
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.model import Transformer, quantised
from rorqual.model.packed_weights import pack_weights
from rorqual.ops import native, registry

needs_c = pytest.mark.skipif(native.load() is None, reason="no C compiler on this machine: only the references exist")
GREEDY = SamplingParams(temperature=0, max_tokens=3)


def small(**changes: object) -> Transformer:
    return build(config(vocab_size=byte_tokenizer().vocab_size, **changes))


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_inference_promises_bits(dtype: torch.dtype) -> None:
    facts = examine(small().to(dtype))
    assert (facts.operations, facts.why) == ("native", None)
    assert facts.dtype == facts.weights == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert facts.device == "cpu" and facts.kernels.startswith("kernels-")


@pytest.mark.parametrize("engram", [False, True])
def test_every_operation_that_runs_is_looked_at(engram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry is watched while a model runs: nothing is picked that the examination does not know, and by the same
    name."""
    memory = {"layers": [0, 2], "rows": 41, "orders": [2, 3], "heads": 2, "head_dim": 4}
    model = small(**({"engram": memory} if engram else {}))
    seen: dict[str, str] = {}
    real = registry.pick

    def watched(operation: str, tensor: torch.Tensor) -> object:
        seen[operation] = registry.chosen(operation, tensor)
        return real(operation, tensor)

    monkeypatch.setattr(registry, "pick", watched)
    with torch.inference_mode():
        model(some_tokens(model, 1, 60), state=model.new_state())
        known = chosen_operations(model)
    inside_others = {"swiglu", "grouped_linear", "index_reduce"}  # the C operations above contain these
    names = {"native"} if native.load() is not None else {"reference", "by_group"}
    missing = {name: by for name, by in seen.items() if known.get(name) != by and name not in inside_others}
    assert not missing and set(seen.values()) <= names
    assert set(ENGRAM) <= set(known) if engram else not set(ENGRAM) & set(known)


@needs_c
def test_what_is_absent_is_said() -> None:
    with registry.only("reference"):
        facts = examine(small())
    assert facts.operations == "reference" and "RORQUAL_OPS" in str(facts.why)
    assert "reference" in facts.kernels
    assert "fp64" in str(examine(small().double()).why) or "float64" in str(examine(small().double()).why)
    odd = examine(small(hc_mult=1, hidden_size=33, q_lora_rank=16))
    assert odd.operations == "mixed" and "hc_pre" in str(odd.why)
    assert "mixes the residual streams" in str(examine(small(residual="hc")).why)
    assert "mixes the residual streams" in str(examine(small(hc_sinkhorn_iters=65)).why)
    assert "on meta" in str(examine(small().to("meta")).why)
    stored = small()
    quantised.quantise(stored, "fp4")
    assert examine(stored).why is None and "rounded" in examine(stored).weights


@needs_c
def test_packed_weights_are_named_and_keep_the_promise() -> None:
    model = build(packable_config())
    pack_weights(model, "fp4")
    facts = examine(model)
    assert (facts.operations, facts.why, facts.weights) == ("native", None, "fp32, packed fp4 and fp8")
    with torch.inference_mode():
        assert chosen_operations(model)["packed_experts"] == "native"


@needs_c
def test_each_request_says_what_was_done() -> None:
    model = small()
    cache = PrefixCache(model, memory_bytes=1 << 22, running_tokens=512, page_tokens=8)
    prompt = some_tokens(model, 40).tolist()
    with Engine(model, byte_tokenizer(), chunk=16, prefix_cache=cache) as engine:
        [first] = engine.generate(prompt, GREEDY)
        [again] = engine.generate(prompt, GREEDY)
        outs = engine.generate([prompt[:30], prompt[5:]], SamplingParams(seed=7, max_tokens=20))
    fresh, hit = first.exactness, again.exactness
    assert fresh is not None and hit is not None
    assert (fresh.level, fresh.cache, fresh.cached_tokens, fresh.prompt_steps) == ("bitwise", "none", 0, 3)
    assert (hit.cache, hit.cached_tokens, hit.seed, hit.batched_with) == ("exact", 40, None, 0)
    assert [out.exactness.seed for out in outs if out.exactness] == [7, 7]
    assert max(out.exactness.batched_with for out in outs if out.exactness) == 1
    assert hit.to_dict()["why"] is None and hit.to_dict()["batch_invariant"] is True


@needs_c
def test_drafts_are_declared() -> None:
    said = []
    for own in (False, lambda known, most: [5] * most):
        with Engine(small(), byte_tokenizer(), speculate=own) as engine:
            [out] = engine.generate([5, 6, 7], GREEDY)
        assert out.exactness is not None
        said.append(out.exactness.speculation)
    assert said == ["none", "exact"]


@needs_c
def test_without_native_operations_nothing_is_promised() -> None:
    with registry.only("reference"), Engine(small(), byte_tokenizer()) as engine:
        [out] = engine.generate([5, 6, 7], GREEDY)
    assert out.exactness is not None and out.exactness.level == "approximate"
    assert not (out.exactness.batch_invariant or out.exactness.chunk_invariant or out.exactness.thread_invariant)


def test_a_foreign_model_is_unknown() -> None:
    with Engine(HashModel(), byte_tokenizer()) as engine:
        request = engine.submit([5, 6], GREEDY)
        request.result(60)
    assert request.exactness is not None and request.exactness.level == "unknown"
    assert "HashModel is not a rorqual.Transformer" in str(request.exactness.why)
