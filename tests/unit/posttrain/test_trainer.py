"""Post-training's trainer: steps, what moves, figures, and a resume that ends in the same bits."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import build, config, gap, some_tokens
from torch import Tensor

from rorqual.errors import CheckpointError, ConfigError, DataError, RorqualError
from rorqual.model import Transformer
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.posttrain.examples import Example
from rorqual.posttrain.scoring import token_logprobs
from rorqual.posttrain.trainer import MOST_SKIPPED, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = config(num_hidden_layers=2, compress_ratios=[0, 4], vocab_size=32)


def losses(model: Transformer, step: int, parts: int = 2) -> list[Callable[[], Tensor]]:
    ids = some_tokens(model, 4, 12, draw_seed=step)
    return [
        lambda rows=rows: -token_logprobs(model, rows).sum() / (4 * 11)  # type: ignore[misc]
        for rows in ids.chunk(parts)
    ]


def trainer(folder: Path, seed: int = 0, trainable: list[str] | None = None, **optim: object) -> Trainer:
    settings = OptimConfig.model_validate({"lr": 1e-2, "warmup_steps": 2, **optim})
    return Trainer(build(CFG, seed), settings, RunConfig(folder=str(folder)), trainable, total_steps=8)


def weights(model: Transformer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_learning_in_micro_batches(tmp_path: Path, kind: str) -> None:
    seen = []
    for parts in (1, 4):
        t = trainer(tmp_path / str(parts), kind=kind)
        updates = [t.update(losses(t.model, 0, parts)) for _ in range(8)]
        assert updates[-1].loss < updates[0].loss - 0.3
        assert updates[0].lr == pytest.approx(0.005) and updates[-1].lr == pytest.approx(0.001)
        seen.append((updates[0], weights(t.model)))
    assert seen[0][0].loss == pytest.approx(seen[1][0].loss, abs=1e-5)
    assert seen[0][0].grad_norm == pytest.approx(seen[1][0].grad_norm, rel=1e-4)


@pytest.mark.parametrize("trainable", [None, ["layers.1.*", "head.weight"]])
def test_resumed_equals_uninterrupted(tmp_path: Path, trainable: list[str] | None) -> None:
    def go(t: Trainer, first: int, last: int) -> None:
        for step in range(first, last):
            update = t.update(losses(t.model, step))
            t.log(t.step, loss=update.loss, noise=float(torch.rand(())))

    torch.manual_seed(5)
    whole = trainer(tmp_path / "whole", trainable=trainable, kind="muon")
    go(whole, 0, 6)
    torch.manual_seed(5)
    broken = trainer(tmp_path / "broken", trainable=trainable, kind="muon")
    go(broken, 0, 3)
    broken.save({"position": 3})
    go(broken, 3, 5)  # lost
    broken.close()
    torch.manual_seed(99)
    again = trainer(tmp_path / "broken", trainable=trainable, kind="muon")
    assert again.resume() == {"position": 3} and again.step == 3
    go(again, 3, 6)
    for name, value in weights(whole.model).items():
        assert torch.equal(value, again.model.get_parameter(name)), name
    lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "broken")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 6


def test_frozen_weights_stay(tmp_path: Path) -> None:
    t = trainer(tmp_path, trainable=["layers.*.attn.w*"])
    before = weights(t.model)
    t.update(losses(t.model, 0))
    moved = {name for name, value in weights(t.model).items() if not torch.equal(value, before[name])}
    assert moved and all(".attn.w" in name for name in moved)
    saved = t.save({})
    from safetensors.torch import load_file

    names = set(load_file(saved / "weights.safetensors"))
    assert moved <= names and "embed.weight" not in names


def test_one_lost_gradient_is_left_out_and_many_end_the_run(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    before = weights(t.model)
    update = t.update([lambda: t.model.embed.weight.sum() * math.nan])
    assert not update.is_applied and all(torch.equal(v, before[n]) for n, v in weights(t.model).items())
    t.update(losses(t.model, 0))
    with pytest.raises(RorqualError, match="no finite gradient"):
        for _ in range(MOST_SKIPPED):
            t.update([lambda: t.model.embed.weight.sum() * math.inf])


def test_figures_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    with trainer(tmp_path) as t:
        t.log(1, loss=math.nan, nested={"a": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "nested": {"a": 1.0}}


def test_computing_in_other_precisions(tmp_path: Path) -> None:
    for changes in ({"dtype": "bf16"}, {"qat": "fp4"}):
        run = RunConfig.model_validate({"folder": str(tmp_path), **changes})
        t = Trainer(build(CFG), OptimConfig(lr=1e-2, warmup_steps=0), run)
        exact = float(sum(loss() for loss in losses(build(CFG), 0)))
        first = t.update(losses(t.model, 0))
        assert first.loss != exact and first.loss == pytest.approx(exact, abs=0.3)
        assert t.update(losses(t.model, 0)).loss < first.loss
        assert all(p.dtype == torch.float32 for p in t.model.parameters())


def test_what_cannot_be_trained_or_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers.9"):
        trainer(tmp_path, trainable=["layers.9.*"])
    with pytest.raises(ConfigError, match=r"dtype=torch\.float32"):
        Trainer(build(CFG).to(torch.bfloat16), OptimConfig(), RunConfig())
    t = trainer(tmp_path)
    assert t.resume() is None
    t.save({})
    with pytest.raises(ConfigError, match="lr"):
        trainer(tmp_path, lr=1e-3).resume()
    with pytest.raises(CheckpointError, match="other weights"):
        trainer(tmp_path, trainable=["head.weight"]).resume()


def test_rates_of_a_schedule() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4, decay="linear", end_lr_share=0.2)
    assert [optim.lr_at(s, 9) for s in (0, 3, 4, 8, 20)] == pytest.approx([0.25, 1.0, 1.0, 0.2, 0.2])
    assert optim.lr_at(1000, None) == 1.0
    cosine = OptimConfig(lr=1.0, warmup_steps=0, end_lr_share=0.0)
    assert cosine.lr_at(4, 9) == pytest.approx(0.5) and cosine.lr_at(8, 9) == pytest.approx(0.0, abs=1e-12)


def test_an_example_has_a_mask_value_per_id() -> None:
    assert Example([1, 2, 3], [True, False, True]).num_targets == 1
    with pytest.raises(DataError, match=r"chat\.jsonl:7 has 3 ids"):
        Example([1, 2, 3], [True], "chat.jsonl:7")


def test_gradients_of_a_frozen_part_do_not_count(tmp_path: Path) -> None:
    some, every = trainer(tmp_path / "a", trainable=["head.weight"]), trainer(tmp_path / "b")
    a, b = some.update(losses(some.model, 0)), every.update(losses(every.model, 0))
    assert a.loss == pytest.approx(b.loss) and a.grad_norm < b.grad_norm
    assert gap(some.model.embed.weight, build(CFG).embed.weight) == 0
