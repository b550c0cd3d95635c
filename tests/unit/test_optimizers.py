"""Muon and AdamW: against torch's own where they agree, block splits, state by name, who gets what."""

import math

import pytest
import torch
from torch import nn

from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.ops.newton_schulz import FIVE_STEP, newton_schulz
from rorqual.train.adamw import AdamW
from rorqual.train.groups import Assigned, Role, assign, blocks
from rorqual.train.muon import Muon


def assigned(name: str, tensor: torch.Tensor, role: Role) -> Assigned:
    return Assigned(name, nn.Parameter(tensor.clone()), role)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_five_step_muon_equals_torch_muon() -> None:
    ours = assigned("w", random(24, 40), Role("muon", (24,)))
    start = ours.parameter.detach().clone()
    theirs = nn.Parameter(start.clone())
    # torch averages (1 - mu) G into its momentum where V4 adds G; the normalised direction is the same.
    muon = Muon([ours], momentum=0.95, weight_decay=0.1, update_rms=0.2, steps=FIVE_STEP)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        gradient = random(24, 40, seed=10 + step)
        ours.parameter.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step(0.02)
        reference.step()
    # torch iterates in bfloat16, hence the 3 %.
    assert (ours.parameter - theirs).norm() < 0.03 * (theirs - start).norm()


def test_update_is_written_as_in_the_paper() -> None:
    weight, gradients = random(12, 20), [random(12, 20, seed=s) for s in (1, 2, 3)]
    ours = assigned("w", weight, Role("muon", (12,)))
    muon = Muon([ours])
    momentum, lr = torch.zeros(12, 20), 0.01
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        update = newton_schulz(0.95 * momentum + gradient) * math.sqrt(20) * 0.18
        weight = weight * (1 - lr * 0.1) - lr * update
        ours.parameter.grad = gradient.clone()
        muon.step(lr)
    torch.testing.assert_close(ours.parameter.detach(), weight)
    assert update.square().mean().sqrt().item() == pytest.approx(0.18, rel=0.01)


def test_zero_gradient_only_decays() -> None:
    ours = assigned("w", random(8, 8), Role("muon", (8,)))
    before = ours.parameter.detach().clone()
    Muon([ours], weight_decay=0.1).step(0.01)
    torch.testing.assert_close(ours.parameter.detach(), before * (1 - 0.001))


def test_every_block_gets_a_full_update_whatever_its_gradient_scale() -> None:
    ours = assigned("layers.0.hc_attn_fn", torch.zeros(24, 64), Role("muon", (4, 4, 16)))
    gradient = random(24, 64)
    gradient[:4] *= 100
    gradient[8:] *= 0.01
    ours.parameter.grad = gradient
    Muon([ours]).step(1.0)
    for part in ours.parameter.detach().split([4, 4, 16]):
        assert part.square().mean().sqrt().item() == pytest.approx(0.18, rel=0.01)


def test_same_shapes_share_a_batch_and_equal_lone_updates() -> None:
    shapes = {"a": (16, 32), "b": (16, 32), "experts": (3, 16, 32), "tall": (32, 16)}
    together = [assigned(n, random(*s, seed=1), Role("muon", s[:1] if len(s) == 2 else ())) for n, s in shapes.items()]
    alone = [assigned(a.name, a.parameter.detach(), a.role) for a in together]
    gradients = {n: random(*s, seed=7 + i) for i, (n, s) in enumerate(shapes.items())}
    muon = Muon(together)
    lone = [Muon([a]) for a in alone]
    for _ in range(2):
        for a, b in zip(together, alone, strict=True):
            a.parameter.grad, b.parameter.grad = gradients[a.name].clone(), gradients[a.name].clone()
        muon.step(0.1)
        for optimizer in lone:
            optimizer.step(0.1)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.parameter, b.parameter)


def test_states_by_name_continue_exactly() -> None:
    def build() -> tuple[list[Assigned], Muon, AdamW]:
        parts = [
            assigned("hc", random(6, 10), Role("muon", (2, 4))),
            assigned("experts", random(2, 5, 7), Role("muon")),
            assigned("norm", random(9), Role("decayed")),
            assigned("bias", random(3), Role("bias")),
        ]
        return parts, Muon(parts[:2]), AdamW(parts[2:])

    def step(parts: list[Assigned], muon: Muon, adamw: AdamW, seed: int) -> None:
        for i, part in enumerate(parts):
            part.parameter.grad = random(*part.parameter.shape, seed=seed * 10 + i)
        muon.step(0.01)
        adamw.step(0.01)

    parts, muon, adamw = build()
    for seed in range(3):
        step(parts, muon, adamw, seed)
    other, muon2, adamw2 = build()
    muon2.load_state_dict(muon.state_dict())
    adamw2.load_state_dict(adamw.state_dict())
    for a, b in zip(parts, other, strict=True):
        b.parameter.data.copy_(a.parameter.data)
    step(parts, muon, adamw, 9)
    step(other, muon2, adamw2, 9)
    for a, b in zip(parts, other, strict=True):
        assert torch.equal(a.parameter, b.parameter), a.name


def test_foreign_state_is_refused() -> None:
    ours = assigned("w", random(4, 4), Role("muon", (4,)))
    with pytest.raises(CheckpointError, match=r"holds nothing for w \(4, 4\)"):
        Muon([ours]).load_state_dict({})
    with pytest.raises(CheckpointError, match=r"holds shape \(4, 5\) for w"):
        Muon([ours]).load_state_dict({"w": torch.zeros(4, 5)})


def test_adamw_decays_norms_but_not_biases_and_survives_zero_gradients() -> None:
    norm, bias = (
        assigned("norm", torch.ones(4), Role("decayed")),
        assigned("sink", torch.ones(4), Role("bias")),
    )
    AdamW([norm, bias], weight_decay=0.5).step(0.1)
    torch.testing.assert_close(norm.parameter.detach(), torch.full((4,), 0.95))
    assert torch.equal(bias.parameter.detach(), torch.ones(4))


def test_tiny_gradients_move_embeddings_by_a_full_step() -> None:
    table = assigned("embed.weight", torch.zeros(3, 2), Role("decayed"))
    table.parameter.grad = torch.full((3, 2), 1e-12)
    AdamW([table], weight_decay=0.0).step(0.1)
    torch.testing.assert_close(table.parameter.detach(), torch.full((3, 2), -0.1), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def minke() -> list[Assigned]:
    from rorqual.model import Transformer

    cfg = ModelConfig.preset("minke")
    with torch.device("meta"):
        return assign(Transformer(cfg), cfg)


def test_every_parameter_has_one_role_and_its_blocks_cover_it(minke: list[Assigned]) -> None:
    names = [a.name for a in minke]
    assert len(names) == len(set(names))
    for a in minke:
        if a.role.kind == "muon":
            covered = sum(block.numel() for block in blocks(a.parameter, a.role))
            assert covered == a.parameter.numel(), a.name
        else:
            assert a.role.row_splits == ()


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embed.weight", Role("decayed")),
        ("head.weight", Role("decayed")),
        ("norm.weight", Role("decayed")),
        ("layers.0.attn.kv_norm.weight", Role("decayed")),
        ("mtp.0.enorm.weight", Role("decayed")),
        ("layers.2.attn.compressor.norm.weight", Role("decayed")),
        ("layers.0.attn.attn_sink", Role("bias")),
        ("layers.0.hc_attn_base", Role("bias")),
        ("layers.0.hc_ffn_scale", Role("bias")),
        ("hc_head_base", Role("bias")),
        ("layers.2.attn.compressor.ape", Role("bias")),
        ("layers.0.hc_attn_fn", Role("muon", (4, 4, 16))),
        ("mtp.0.hc_ffn_fn", Role("muon", (4, 4, 16))),
        ("hc_head_fn", Role("muon", (4,))),
        ("layers.0.attn.wo_a.weight", Role("muon", (64, 64))),
        ("layers.0.attn.wkv.weight", Role("muon", (64,))),
        ("layers.2.attn.compressor.wkv.weight", Role("muon", (64, 64))),
        ("layers.2.attn.indexer.compressor.wgate.weight", Role("muon", (32, 32))),
        ("layers.3.attn.compressor.wkv.weight", Role("muon", (64,))),
        ("layers.0.ffn.experts.w1", Role("muon")),
        ("layers.0.ffn.gate.weight", Role("muon", (16,))),
        ("mtp.0.e_proj.weight", Role("muon", (128,))),
    ],
)
def test_roles_of_minke(minke: list[Assigned], name: str, role: Role) -> None:
    assert {a.name: a.role for a in minke}[name] == role
