"""Dense, indexer warm-up, sparse: what learns when, exactly; and MTP modules in a chain."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import newest_files, records, tiny_config, tiny_run

from rorqual.errors import ConfigError
from rorqual.model import Trace, Transformer, next_tokens
from rorqual.train import losses
from rorqual.train.feed import Rows
from rorqual.train.loop import build_schedule
from rorqual.train.schedules import Stage

WARMUP = ["schedule.index_warmup=0.3", "schedule.index_warmup_lr=0.01", "run.checkpoint_every_s=1e-9"]


def test_stages_follow_the_consumed_tokens() -> None:
    schedule = build_schedule(tiny_config(Path("unused"), "schedule.index_warmup=0.25"))
    assert (schedule.total_tokens, schedule.dense_until) == (640, 0.3)
    stages = [schedule.stage(tokens) for tokens in (0, 191, 192, 351, 352, 639)]
    assert stages == [Stage.DENSE] * 2 + [Stage.INDEX_WARMUP] * 2 + [Stage.SPARSE] * 2
    assert [schedule.is_dense(tokens) for tokens in (191, 351, 352)] == [True, True, False]
    in_steps = dataclasses.replace(schedule, index_warmup=3)
    assert [in_steps.stage(tokens) for tokens in (192 + 3 * 64 - 1, 192 + 3 * 64)] == [
        Stage.INDEX_WARMUP,
        Stage.SPARSE,
    ]
    without = dataclasses.replace(schedule, index_warmup=0.0)
    assert without.stage(192) is Stage.SPARSE


def test_only_indexers_move_in_the_warmup(tmp_path: Path) -> None:
    tiny_run(tmp_path, *WARMUP, "run.keep_checkpoints=20")
    stages = [r["stage"] for r in records(tmp_path) if "loss" in r]
    assert stages == ["dense"] * 3 + ["index_warmup"] * 3 + ["sparse"] * 4
    steps = {r["step"]: r for r in records(tmp_path) if "loss" in r}
    assert steps[4]["lr"] == 0.01 and steps[3]["lr"] != 0.01
    assert set(steps[4]["grad_norms"]) == {"indexer"} and "attention" in steps[7]["grad_norms"]

    def state(step: int, kind: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / f"checkpoints/step-{step:08d}/{kind}.safetensors")

    for kind in ("weights", "optimizer"):
        before, after, later = state(3, kind), state(6, kind), state(7, kind)
        assert before.keys() == after.keys()
        for name in before:
            if name == "adamw/#step":
                assert (after[name] - before[name]).item() == 3
            elif ".indexer." in name:
                assert not torch.equal(before[name], after[name]), name
            else:
                assert torch.equal(before[name], after[name]), name
        moved = [name for name in after if not torch.equal(after[name], later[name])]
        assert any(".indexer." not in name for name in moved) and len(moved) > len(after) // 2


@pytest.mark.parametrize("stop", [4, 7])
def test_a_run_cut_in_or_after_the_warmup_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    tiny_run(tmp_path / "whole", *WARMUP)
    tiny_run(tmp_path / "cut", *WARMUP, f"run.max_steps={stop}")
    tiny_run(tmp_path / "cut", *WARMUP, resume=True)
    assert newest_files(tmp_path / "cut") == newest_files(tmp_path / "whole")


def test_a_warmup_from_the_first_step_is_possible(tmp_path: Path) -> None:
    assert tiny_run(tmp_path, *WARMUP, "schedule.dense_until=0").finished


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.overrides.compress_ratios=[0, 0, 0]"], "no layer of this model has an indexer"),
        (["loss.index=0"], "loss.index is 0, so nothing would learn"),
    ],
)
def test_a_warmup_in_which_nothing_learns_is_refused(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, *WARMUP, *settings)


def test_chained_mtp_modules_predict_ever_later_tokens() -> None:
    """The sum of V3: lambda / D times the modules' losses, module k fed by module k - 1."""
    cfg = tiny_config(Path("unused")).model.build()
    cfg = cfg.replace(num_nextn_predict_layers=3, compress_ratios=(0, 4, 0, 0, 0))
    model = Transformer(cfg, seed=0)
    tokens = torch.randint(0, 48, (2, 16), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(2, 16, dtype=torch.int64)
    segments[1, 9:] = 1
    labels = torch.full_like(tokens, losses.IGNORE)
    labels[:, :-1] = tokens[:, 1:]
    labels[1, 8] = losses.IGNORE
    rows = Rows(tokens, labels, segments)
    targets = losses.mtp_targets(rows, 3)
    for depth, target in enumerate(targets):
        for row, column in (target != losses.IGNORE).nonzero().tolist():
            assert target[row, column] == tokens[row, column + depth + 2]
            assert segments[row, column] == segments[row, column + depth + 2]
    counts = [int((target != losses.IGNORE).sum()) for target in targets]
    assert counts == [14 + 7 + 5, 13 + 6 + 4, 12 + 5 + 3]
    weights = losses.LossWeights(0.3, 0.0, 0.0, 29, counts[0], 1.0, 1.0, tuple(counts[1:]))
    loss, parts = losses.compute(model, rows, weights, dense=True)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("mtp.2."))

    trace = Trace(dense=True)
    streams, ahead, expected = model.forward_streams(tokens, segment_ids=segments, trace=trace), tokens, 0.0
    for depth, (target, count) in enumerate(zip(targets, counts, strict=True)):
        ahead = next_tokens(ahead)
        streams = model.mtp_streams(streams, ahead, segment_ids=segments, trace=trace, depth=depth)
        logits = model.logits(model.mtp_hidden(streams, depth))
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=losses.IGNORE, reduction="sum"
        )
        expected += nats.item() / count / 3
    assert parts.mtp == pytest.approx(expected, rel=1e-5)


def test_a_run_trains_every_mtp_module(tmp_path: Path) -> None:
    chained = ["model.overrides.num_nextn_predict_layers=2", "model.overrides.compress_ratios=[0, 4, 0, 0]"]
    tiny_run(tmp_path, *chained, "optim.lr=0.01")
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert "mtp.1.ffn.gate" in steps[0]["max_violation"] and steps[-1]["mtp"] < steps[0]["mtp"]
