"""Adapters exchanged with PEFT on transformers' V4: each loads the other's folder, with equal logits and gradients."""

from pathlib import Path

import pytest
import torch
from small_models import build, config, some_tokens

from rorqual.checkpoint import load_adapter, save_adapter, save_transformers
from rorqual.model import Transformer, adapters
from rorqual.model.adapters import AdapterSpec

peft = pytest.importorskip("peft", reason="peft is not installed; parity with it cannot be shown")
from transformers import DeepseekV4ForCausalLM  # noqa: E402

pytestmark = pytest.mark.slow
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Transformer:
    # sixteen indexer heads: with few, ReLU makes scores tie at zero and the two top-k rules may differ
    return build(config(head_dim=32, index_n_heads=16, index_topk=4))


def copy_of(model: Transformer) -> Transformer:
    out = Transformer(model.cfg, seed=None).eval()
    out.load_state_dict(model.state_dict())
    return out


def peer_of(model: Transformer, folder: Path) -> DeepseekV4ForCausalLM:
    save_transformers(model, folder)
    return DeepseekV4ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def test_ours_on_theirs(model: Transformer, tmp_path: Path) -> None:
    """Our folder, loaded by PEFT: logits, and the gradient of every A and B."""
    mine, tokens = copy_of(model), some_tokens(model, 2, 40)
    adapters.attach(mine, AdapterSpec(3, 12.0, ("wq_a", "wq_b", "wo_b", "shared_experts.*")))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for target in adapters.adapted(mine):
            b = adapters.pair(target)[1]
            b.copy_(torch.randn(b.shape, generator=draw) * 0.2)
    save_adapter(mine, tmp_path / "adapter", layout="transformers")
    theirs = peft.PeftModel.from_pretrained(peer_of(model, tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    ours, other = mine(tokens), theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours, other, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        assert float((ours - model(tokens)).abs().max()) > 100 * TOLERANCE
    for logits in (ours, other):
        (torch.log_softmax(logits, -1)[..., 0].mean()).backward()
    found = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(found) == len(adapters.adapter_names(mine))
    for target in adapters.adapted(mine):
        for letter, parameter in zip("AB", adapters.pair(target), strict=True):
            (peer,) = [g for name, g in found.items() if _is_for(name, target.name, letter)]
            torch.testing.assert_close(parameter.grad, peer, rtol=5e-3, atol=1e-6)


def _is_for(name: str, ours: str, letter: str) -> bool:
    from rorqual.checkpoint import to_transformers

    module = to_transformers(f"{ours}.weight").removesuffix(".weight")
    return f".{module}.lora_{letter}." in name


def test_theirs_on_ours(model: Transformer, tmp_path: Path) -> None:
    """A folder that PEFT saved, rank-stabilised, loaded here beside the weights and merged."""
    mine, tokens = copy_of(model), some_tokens(model, 2, 40)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_b_proj", "down_proj"], use_rslora=True)
    theirs = peft.get_peft_model(peer_of(model, tmp_path / "base"), settings).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(mine, tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(tokens, use_cache=False).logits
        torch.testing.assert_close(mine(tokens), wanted, rtol=0, atol=TOLERANCE)
        adapters.merge(mine)
        torch.testing.assert_close(mine(tokens), wanted, rtol=0, atol=TOLERANCE)
