"""An adapter's memory plan counts what training one holds."""

from pathlib import Path

import pytest
from small_models import build, packable_config, some_tokens

from rorqual.config import ModelConfig
from rorqual.model.adapters import AdapterSpec
from rorqual.planner.adapters import adapter_plan
from rorqual.planner.tensors import inventory
from rorqual.posttrain.config import LoraConfig, OptimConfig, RunConfig
from rorqual.posttrain.lora import adapter_spec, prepare
from rorqual.posttrain.trainer import Trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_counts_are_the_trainers(tmp_path: Path, optimizer: str) -> None:
    cfg = packable_config()
    lora = LoraConfig(r=5, target_modules=["attn.*", "experts.w?"], layers="upper-third")
    plan = adapter_plan(cfg, adapter_spec(lora, cfg), optimizer=optimizer)
    model = build(cfg)
    names = prepare(model, lora)
    assert {name.split(".")[1] for name in names} == {"2"}
    run = RunConfig(folder=str(tmp_path), threads=1)
    with Trainer(model, OptimConfig(kind=optimizer), run, trainable=names) as trainer:
        trainer.update([lambda: model(some_tokens(model, 1, 8)).mean()])
        assert trainer.num_trained == plan.parameters and plan.adapter == 4 * plan.parameters
        state = [
            tensor
            for part in trainer._optimizers.values()
            for key, tensor in part.state_dict().items()
            if "lora" in key and tensor.dim() >= 2
        ]
        assert sum(tensor.nbytes for tensor in state) == plan.optimizer
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert sum(gradient.nbytes for gradient in gradients) == plan.gradients
    assert plan.weights == inventory(cfg, "official").nbytes


@pytest.mark.slow
def test_one_gpu_sees_what_fits() -> None:
    """V4-Flash's frozen weights alone need more than one card of 141 GB; two hold them with an adapter."""
    cfg = ModelConfig.preset("v4-flash")
    plan = adapter_plan(cfg, adapter_spec(LoraConfig(r=16), cfg), tokens=4096)
    assert 0 < plan.share < 0.01
    assert plan.optimizer == 2 * plan.gradients == 2 * plan.adapter
    assert plan.total > plan.weights > 100e9
    assert not plan.fits(141e9) and plan.fits(2 * 141e9)
    experts = adapter_plan(cfg, AdapterSpec(16, 32.0, ("experts.w1",)), tokens=4096)
    assert experts.modules == cfg.num_hidden_layers * cfg.n_routed_experts
