"""Whole runs that are hurt on purpose: the spike is noticed, the run goes back, and ends where it would have ended."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinyFeed, newest_files, records, tiny_run

from rorqual.errors import RorqualError
from rorqual.model import Transformer
from rorqual.train import build

STEPS = 60
LONG = [
    f"schedule.total_tokens={STEPS * 64}",
    "optim.lr=0.005",
    "stability={warmup_steps=20, snapshot_every=10, active_steps=6, lag=2, cooldown_steps=5}",
]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Transformer]:
    """The models that runs build, so that a test can hurt them."""
    built: list[Transformer] = []
    real = build.build_model

    def remembering(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        built.append(result[0])
        return result

    monkeypatch.setattr(build, "build_model", remembering)
    return built


def hurting(models: list[Transformer], at: int, hurt: Callable[[Transformer], None], times: int = 1) -> TinyFeed:
    """A feed that damages the weights while batch `at` is fetched, the first `times` times."""
    feed, left = TinyFeed(), [times]

    def before(number: int) -> None:
        if number == at and left[0]:
            left[0] -= 1
            with torch.no_grad():
                hurt(models[-1])

    feed.before = before
    return feed


def double_head(model: Transformer) -> None:
    model.head.weight.mul_(-2)


def break_number(model: Transformer) -> None:
    model.layers[0].ffn.shared_experts.w1.weight[0, 0] = math.nan


def curve(folder: Path) -> dict[int, float]:
    """The loss by step; of steps that were made twice, the later."""
    return {r["step"]: r["lm"] for r in records(folder) if "lm" in r}


def events(folder: Path) -> list[tuple[str, int]]:
    return [(r["event"], r["step"]) for r in records(folder) if "event" in r]


@pytest.mark.slow
def test_a_spike_is_undone_and_the_run_ends_as_it_would_have(tmp_path: Path, models: list[Transformer]) -> None:
    result = tiny_run(tmp_path / "calm", *LONG)
    assert events(tmp_path / "calm") == []
    feed = hurting(models, 45, double_head)
    hurt = tiny_run(tmp_path / "hurt", *LONG, feed=feed)
    assert hurt.finished and hurt.step == result.step == STEPS
    assert events(tmp_path / "hurt") == [("spike", 46), ("rollback", 40), ("phase", 46), ("phase", 48)]
    spike, rollback = [r for r in records(tmp_path / "hurt") if r.get("event") in ("spike", "rollback")]
    assert spike["onset"] == 46 and spike["loss"] > spike["predicted"] + 1 and spike["score"] > 6
    assert (rollback["from_step"], rollback["source"], rollback["rollbacks"]) == (46, "memory", 1)
    assert feed.served == [*range(46), *range(40, STEPS)]  # from the state's batch on, none left out
    before, after = curve(tmp_path / "calm"), curve(tmp_path / "hurt")
    assert [after[step] for step in range(1, 41)] == [before[step] for step in range(1, 41)]
    gap = [abs(after[step] - before[step]) for step in range(50, STEPS + 1)]
    assert max(gap) < 0.1 and before[1] - before[STEPS] > 1
    ages = [r["routing_age"] for r in records(tmp_path / "hurt") if "routing_age" in r]
    assert ages == [0, 1, 2, 2, 2, 2]


@pytest.mark.slow
def test_what_is_done_without_anticipatory_routing_is_the_undamaged_run(
    tmp_path: Path, models: list[Transformer]
) -> None:
    tiny_run(tmp_path / "calm", *LONG, "stability.active_steps=0")
    tiny_run(tmp_path / "hurt", *LONG, "stability.active_steps=0", feed=hurting(models, 45, double_head))
    assert curve(tmp_path / "hurt") == curve(tmp_path / "calm")
    assert newest_files(tmp_path / "hurt") == newest_files(tmp_path / "calm")


@pytest.mark.slow
def test_a_loss_that_is_no_number_goes_back_to_a_checkpoint_on_disk(tmp_path: Path, models: list[Transformer]) -> None:
    settings = [*LONG, "stability.snapshot_every=0", "run.checkpoint_every_s=1e-9", "run.keep_checkpoints=3"]
    feed = hurting(models, 15, break_number)  # within the warm-up: what is no number needs no statistics
    result = tiny_run(tmp_path, *settings, feed=feed)
    assert result.finished
    assert events(tmp_path)[:2] == [("spike", 16), ("rollback", 14)]
    rollback = next(r for r in records(tmp_path) if r.get("event") == "rollback")
    assert rollback["source"] == "checkpoint" and feed.served == [*range(16), *range(14, STEPS)]
    assert all(math.isfinite(value) for step, value in curve(tmp_path).items())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_checkpoints_after_the_state_are_gone_and_a_restart_begins_there(
    tmp_path: Path, models: list[Transformer]
) -> None:
    settings = [*LONG, "run.checkpoint_every_s=1e-9", "run.keep_checkpoints=2"]
    feed = hurting(models, 45, double_head)
    kept_before = feed.before

    class KillError(Exception):
        pass

    def before(number: int) -> None:
        if number == 43 and 45 in feed.served:  # the second time: after the roll-back, batches 40 and 41 wait
            raise KillError
        kept_before(number)

    feed.before = before
    with pytest.raises(KillError):
        tiny_run(tmp_path, *settings, feed=feed)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps[-1] < "step-00000042"
    again = TinyFeed()
    assert tiny_run(tmp_path, *settings, feed=again, resume=True).finished
    assert again.served[0] == int(steps[-1].removeprefix("step-"))
    assert again.served == list(range(again.served[0], STEPS))
    assert events(tmp_path)[:2] == [("rollback", 40), ("phase", 46)]  # the spike lies after the state, and is no more
    ages = [r["routing_age"] for r in records(tmp_path) if "routing_age" in r]
    assert len(ages) == 6


def test_roll_backs_are_counted_and_then_the_run_ends(tmp_path: Path, models: list[Transformer]) -> None:
    feed = hurting(models, 45, break_number, times=99)
    with pytest.raises(RorqualError, match=r"The loss at step 44 is nan.*Lower optim.lr"):
        tiny_run(tmp_path, *LONG, "stability.max_rollbacks=2", feed=feed)
    assert [name for name, _ in events(tmp_path) if name != "phase"] == ["spike", "rollback"] * 2 + ["spike", "lost"]
    lost = records(tmp_path)[-1]
    assert lost["reason"] == "all 2 roll-backs (stability.max_rollbacks) are used up"


@pytest.mark.slow
def test_a_finite_spike_without_a_way_back_is_told_and_the_run_goes_on(
    tmp_path: Path, models: list[Transformer]
) -> None:
    feed = hurting(models, 45, double_head)
    result = tiny_run(tmp_path, *LONG, "stability.snapshot_every=0", feed=feed)
    assert result.finished
    assert events(tmp_path)[:2] == [("spike", 46), ("kept on", 46)]
    assert len(curve(tmp_path)) == STEPS


@pytest.mark.slow
def test_switched_off_it_only_ends_what_is_lost(tmp_path: Path, models: list[Transformer]) -> None:
    tiny_run(tmp_path / "spike", *LONG, "stability.detect=false", feed=hurting(models, 45, double_head))
    assert events(tmp_path / "spike") == []
    with pytest.raises(RorqualError, match="The loss at step 46 is nan"):
        tiny_run(tmp_path / "nan", *LONG, "stability.detect=false", feed=hurting(models, 45, break_number))


def test_a_state_too_large_for_memory_is_left_to_the_disk(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    tiny_run(tmp_path, "stability.snapshot_gib=0.00001", "run.max_steps=1")
    told = caplog.text + capsys.readouterr().err
    assert "goes back to a checkpoint on disk" in told
