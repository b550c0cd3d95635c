"""Low-rank adapters: nothing at first, the same merged or beside, only they are trained, through packed weights too."""

import copy
import json
from pathlib import Path

import pytest
import torch
from small_models import build, config, gap, packable_config, some_tokens
from torch import Tensor

from rorqual.checkpoint import load_adapter, load_model, save_adapter, save_official
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Transformer, adapters
from rorqual.model.adapters import AdapterSpec
from rorqual.model.packed_weights import pack_weights
from rorqual.model.quantised import quantise, release
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.posttrain.trainer import Trainer

EVERYWHERE = ("attn.*", "shared_experts.*", "experts.w?")


def spec(*targets: str, rank: int = 3, **more) -> AdapterSpec:
    return AdapterSpec(rank, 6.0, targets or EVERYWHERE, **more)


def randomised(model: Transformer, seed: int = 3) -> Transformer:
    """As after training: B not zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for target in adapters.adapted(model):
            b = adapters.pair(target)[1]
            b.copy_(torch.randn(b.shape, generator=draw) * 0.2)
    return model


def decoded(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] through a state: a chunk, then one by one."""
    state = model.new_state(tokens.shape[0])
    cuts = [tokens[:, :7], *tokens[:, 7:].split(1, dim=1)]
    with torch.no_grad():
        return torch.cat([model(cut, state=state) for cut in cuts], 1)


@pytest.mark.parametrize("weights", [None, "fp4", "fp4-bf16"])
def test_an_untrained_adapter_changes_no_bit(weights: str | None) -> None:
    model = build(packable_config())
    if weights:
        pack_weights(model, weights)
    tokens = some_tokens(model, 2, 30)
    with torch.no_grad():
        plain = model(tokens)
    stepped = decoded(model, tokens)
    adapters.attach(model, spec())
    with torch.no_grad():
        assert torch.equal(model(tokens), plain)
    assert torch.equal(decoded(model, tokens), stepped)
    trained = model(tokens)
    assert trained.requires_grad
    adapters.detach(model)
    with torch.enable_grad():
        assert torch.equal(trained.detach(), model(tokens).detach())
    assert not any("lora" in name for name in model.state_dict())


def test_merged_is_beside() -> None:
    model = build(packable_config())
    base = copy.deepcopy(model)
    tokens = some_tokens(model, 2, 30)
    adapters.attach(model, spec())
    randomised(model)
    with torch.no_grad():
        beside = model(tokens)
        assert gap(beside, base(tokens)) > 1e-2
        with adapters.disabled(model):
            assert torch.equal(model(tokens), base(tokens))
        assert torch.equal(model(tokens), beside)
    stepped = decoded(model, tokens)
    assert gap(stepped, beside) < 1e-4
    adapters.merge(model)
    with torch.no_grad():
        assert gap(model(tokens), beside) < 1e-4
    assert gap(decoded(model, tokens), beside) < 1e-4
    assert set(model.state_dict()) == set(base.state_dict())


def frozen_truth(model: Transformer) -> Transformer:
    """The model whose unpacked weights are those that `pack_weights(model, "fp4")` keeps."""
    packed = copy.deepcopy(model)
    pack_weights(packed, "fp4")
    out = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            module, _, leaf = name.rpartition(".")
            held = packed.get_submodule(module).__dict__.get(leaf)
            if held is not None:
                parameter.copy_(held.dequantise())
    return out


@pytest.mark.parametrize("targets", [("attn.*",), EVERYWHERE])
def test_gradients_pass_through_packed_weights(targets: tuple[str, ...]) -> None:
    """The loss and every adapter's gradient are those beside the unpacked weights of the same values."""
    source = build(packable_config())
    plain, packed = frozen_truth(source), copy.deepcopy(source)
    pack_weights(packed, "fp4")
    tokens = some_tokens(source, 2, 30)
    losses = []
    for model in (plain, packed):
        names = adapters.attach(model, spec(*targets))
        randomised(model)
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(loss.detach())
        assert [name for name, p in model.named_parameters() if p.requires_grad] == sorted_as(model, names)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    ours, truth = dict(packed.named_parameters()), dict(plain.named_parameters())
    for name in adapters.adapter_names(packed):
        torch.testing.assert_close(ours[name].grad, truth[name].grad, rtol=2e-3, atol=2e-6, msg=name)


def sorted_as(model: Transformer, names: list[str]) -> list[str]:
    return [name for name, _ in model.named_parameters() if name in set(names)]


def test_gradient_through_fp4_experts_is_the_slope() -> None:
    """Central differences of the packed model itself, in the direction of the gradient of each kind of adapter."""
    model = build(packable_config())
    pack_weights(model, "fp4")
    adapters.attach(model, spec("attn.wq_b", "experts.w1", "experts.w2"))
    randomised(model)
    tokens = some_tokens(model, 1, 24)
    weights = torch.randn(1, 24, model.cfg.vocab_size, generator=torch.Generator().manual_seed(1)) / 24

    def loss() -> Tensor:
        return (torch.log_softmax(model(tokens), -1) * weights).double().sum()

    loss().backward()
    for kind in ("layers.0.attn.wq_b.lora_B", "layers.1.ffn.experts.w1_lora_A", "layers.0.ffn.experts.w2_lora_B"):
        parameter = model.get_parameter(kind)
        gradient = parameter.grad
        assert gradient is not None and gradient.norm() > 0
        direction, step = gradient / gradient.norm(), 2e-3
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            slope = float(above - loss()) / (2 * step)
            parameter.add_(direction, alpha=step)
        assert slope == pytest.approx(float(gradient.norm()), rel=2e-2), kind


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    model = build(config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = adapters.attach(model, spec())
    tokens = some_tokens(model, 2, 24)
    run = RunConfig(folder=str(tmp_path), threads=1)
    with Trainer(model, OptimConfig(lr=1e-2, warmup_steps=0), run, trainable=names) as trainer:
        for _ in range(2):
            trainer.update([lambda: model(tokens).logsumexp(-1).mean()])
        assert trainer.num_trained == sum(model.get_parameter(name).numel() for name in names)
        assert {a.name for a in trainer.assigned} == set(names)
        assert all("lora" in key for key in _optimizer_keys(trainer))
        trainer.save({})
    moved = {name for name in names if "lora_B" in name and bool(model.get_parameter(name).any())}
    assert moved
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def _optimizer_keys(trainer: Trainer) -> list[str]:
    return [
        f"{prefix}/{key}" for prefix, part in trainer._optimizers.items() for key in part.state_dict() if "." in key
    ]


def test_files_come_back(tmp_path: Path) -> None:
    model = build(packable_config())
    base = copy.deepcopy(model)
    adapters.attach(model, spec())
    randomised(model)
    tokens = some_tokens(model, 2, 30)
    with torch.no_grad():
        wanted = model(tokens)
    save_adapter(model, tmp_path / "a", base="small")
    stated = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["r"], stated["lora_alpha"]) == ("LORA", 3, 6.0)
    load_adapter(base, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(base(tokens), wanted)
    with pytest.raises(ConfigError, match="no place for"):
        save_official(model, tmp_path / "m")
    adapters.merge(model)
    save_official(model, tmp_path / "m")
    with torch.no_grad():
        assert gap(load_model(tmp_path / "m")(tokens), wanted) < 1e-4


def test_transformers_names_are_read_and_written(tmp_path: Path) -> None:
    model = build(config())
    base = copy.deepcopy(model)
    adapters.attach(model, spec("wq_a", "shared_experts.w1"))
    randomised(model)
    save_adapter(model, tmp_path, layout="transformers")
    stated = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert "model.layers.0.self_attn.q_a_proj" in stated and "model.layers.0.mlp.shared_experts.gate_proj" in stated
    load_adapter(base, tmp_path)
    for name in adapters.adapter_names(model):
        assert torch.equal(base.get_parameter(name), model.get_parameter(name))
    adapters.detach(model)
    adapters.attach(model, spec("experts.w1"))
    with pytest.raises(ConfigError, match="fused tensors"):
        save_adapter(model, tmp_path, layout="transformers")


def test_rounded_weights_keep_exact_adapters() -> None:
    """Under QAT the frozen weights are rounded, the adapter is not."""
    model = build(packable_config())
    adapters.attach(model, spec("attn.*", "experts.w?"))
    randomised(model)
    tokens = some_tokens(model, 1, 20)
    quantise(model, "fp4")
    with torch.no_grad():
        rounded = model(tokens)
    release(model)
    truth = frozen_truth_under_bf16(model)
    with torch.no_grad():
        assert gap(rounded, truth(tokens)) < 1e-4


def frozen_truth_under_bf16(model: Transformer) -> Transformer:
    """A copy whose base weights are the rounded ones, its adapters as they are."""
    from rorqual.model.quantised import used_values

    source = copy.deepcopy(model)
    adapters.detach(source)
    quantise(source, "fp4")
    out = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in used_values(source).items():
            out.get_parameter(name).copy_(value)
    return out


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = build(config())
    with pytest.raises(ConfigError, match="'wq_c' names no module"):
        adapters.attach(model, spec("wq_c"))
    with pytest.raises(ConfigError, match="in layers \\[9\\]"):
        adapters.attach(model, spec("wq_a", layers=(9,)))
    with pytest.raises(ConfigError, match="dropout 0.1 and routed experts"):
        adapters.attach(model, spec("experts.w1", dropout=0.1))
    with pytest.raises(ConfigError, match="rank 0"):
        spec("wq_a", rank=0)
    assert not any("lora" in name for name, _ in model.named_parameters())
    adapters.attach(model, spec("wq_a", layers=(2, 3)))
    assert {name.split(".")[1] for name in adapters.adapter_names(model)} == {"2", "3"}
    with pytest.raises(ConfigError, match="adapters already"):
        adapters.attach(model, spec("wq_a"))
    save_adapter(model, tmp_path)
    other = build(config(q_lora_rank=12))
    with pytest.raises((CheckpointError, ConfigError), match="another model"):
        load_adapter(other, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ConfigError, match="DoRA"):
        load_adapter(build(config()), tmp_path)
    packed = build(packable_config())
    pack_weights(packed, "fp4")
    adapters.attach(packed, spec("wq_a"))
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapters.merge(packed)
