"""Anticipatory routing: the queue's phases with counted batches, then whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinyFeed, newest_files, records, tiny_run

from rorqual.train.anticipatory import AnticipatoryRouting, Phase


class Data:
    """Batches are numbers, ten tokens each; the run is over after `last`."""

    def __init__(self, last: int = 1000) -> None:
        self.number, self.last, self.step = 0, last, 0
        self.routed: list[tuple[int, int]] = []

    def fetch(self, tokens: int) -> int | None:
        assert tokens == 10 * self.number  # always asked for the moment at which the batch will be used
        if self.number == self.last:
            return None
        self.number += 1
        return self.number - 1

    def routing(self, lag: int) -> AnticipatoryRouting[int]:
        def route(batch: int) -> tuple[int, int]:
            self.routed.append((batch, self.step))
            return batch, self.step

        return AnticipatoryRouting(self.fetch, route, lambda: {"at": self.number}, lambda batch: 10, lag=lag)

    def advance(self, routing: AnticipatoryRouting[int], steps: int) -> list[tuple[int, Any, int | None, Phase]]:
        """(batch, ids, age, phase of the step) of each step."""
        out = []
        for _ in range(steps):
            phase = routing.phase
            out.append((*routing.next(self.step, 10 * self.step), phase))
            self.step += 1
            routing.step_done()
        return out


def test_ages_grow_to_the_lag_and_every_batch_is_used_once_in_order() -> None:
    data = Data()
    routing = data.routing(lag=3)
    seen = data.advance(routing, 5)
    routing.start(6, data.step, 10 * data.step)
    assert len(routing.queue) == 3
    seen += data.advance(routing, 12)
    assert [batch for batch, *_ in seen] == list(range(17))
    assert [age for *_, age, _ in seen] == [None] * 5 + [0, 1, 2, 3, 3, 3] + [None] * 6
    assert [ids for _, ids, *_ in seen[5:11]] == [(5, 5), (6, 5), (7, 5), (8, 5), (9, 6), (10, 7)]
    assert [phase for *_, phase in seen] == [Phase.NORMAL] * 5 + [Phase.ACTIVE] * 6 + [Phase.DRAIN] * 3 + [
        Phase.NORMAL
    ] * 3


def test_lag_zero_uses_what_was_just_noted() -> None:
    data = Data()
    routing = data.routing(lag=0)
    routing.start(3, 0, 0)
    seen = data.advance(routing, 5)
    assert [(ids, age) for _, ids, age, _ in seen] == [
        ((0, 0), 0),
        ((1, 1), 0),
        ((2, 2), 0),
        (None, None),
        (None, None),
    ]
    assert routing.phase is Phase.NORMAL  # nothing waited, so nothing was drained


def test_the_end_of_the_run_empties_the_queue() -> None:
    data = Data(last=6)
    routing = data.routing(lag=4)
    routing.start(100, 0, 0)
    assert [batch for batch, *_ in data.advance(routing, 6)] == list(range(6))
    assert not routing.queue


def test_position_is_that_of_the_oldest_batch_and_the_queue_can_be_filled_again() -> None:
    data = Data()
    routing = data.routing(lag=3)
    data.advance(routing, 2)
    routing.start(9, data.step, 20)
    data.advance(routing, 4)
    assert routing.position() == {"at": 6} and data.number == 9
    state = routing.state_dict()
    assert state == {"phase": "active", "steps_left": 5, "made_at": [3, 4, 5]}
    noted = [waiting.ids for waiting in routing.queue]

    again = Data()
    again.number, again.step = 6, 6
    other = again.routing(lag=3)
    other.load_state_dict(state, 60, lambda index, batch: noted[index] if index < 2 else None)
    assert again.number == 9 and other.position() == {"at": 6}
    assert again.routed == [(8, 6)]  # only what had not been kept
    assert again.advance(other, 4)[:2] == data.advance(routing, 4)[:2]


def test_lag_zero_is_ordinary_training_bit_for_bit(tmp_path: Path) -> None:
    tiny_run(tmp_path / "plain")
    tiny_run(tmp_path / "ahead", "stability.active_from=0", "stability.active_steps=10", "stability.lag=0")
    found = [[r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("plain", "ahead")]
    assert found[0] == found[1] and len(found[0]) == 10
    assert newest_files(tmp_path / "plain") == newest_files(tmp_path / "ahead")
    ages = [r.get("routing_age") for r in records(tmp_path / "ahead") if "loss" in r]
    assert ages == [0] * 10


def test_older_ids_change_the_run_but_not_its_data(tmp_path: Path) -> None:
    feed, plain = TinyFeed(), TinyFeed()
    tiny_run(tmp_path / "plain", "optim.lr=0.02", feed=plain)
    settings = ["optim.lr=0.02", "stability.active_from=2", "stability.active_steps=4", "stability.lag=2"]
    tiny_run(tmp_path / "ahead", *settings, feed=feed)
    assert feed.served == plain.served == list(range(10))
    steps = [r for r in records(tmp_path / "ahead") if "loss" in r]
    assert [r.get("routing_age") for r in steps] == [None, None, 0, 1, 2, 2, None, None, None, None]
    before = [r["loss"] for r in records(tmp_path / "plain") if "loss" in r]
    after = [r["loss"] for r in steps]
    assert after[:3] == before[:3] and after[3:] != before[3:]
    assert [r["phase"] for r in records(tmp_path / "ahead") if r.get("event") == "phase"] == ["drain", "normal"]
    # What is counted is what the training pass used: tokens of a step, once.
    assert all(set(r["max_violation"]) == {"layers.0.ffn.gate", "layers.1.ffn.gate", "mtp.0.ffn.gate"} for r in steps)


@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)])
def test_resumed_while_batches_wait_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop: int) -> None:
    settings = ["optim.lr=0.02", "stability.active_from=2", "stability.active_steps=4", "stability.lag=3"]
    tiny_run(tmp_path / "whole", *settings)
    tiny_run(tmp_path / "cut", *settings, f"run.max_steps={stop}")
    feed = TinyFeed()
    tiny_run(tmp_path / "cut", *settings, feed=feed, resume=True)
    assert feed.served == list(range(stop, 10))  # no batch skipped, none trained on twice
    assert newest_files(tmp_path / "cut") == newest_files(tmp_path / "whole")
    losses = [[r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_routing_without_the_kept_ids_is_noted_anew(tmp_path: Path) -> None:
    """As after a resume on another number of processes: the data is the same, the ids are those of now."""
    from safetensors.torch import load_file, save_file

    settings = ["stability.active_from=2", "stability.active_steps=4", "stability.lag=3"]
    tiny_run(tmp_path, *settings, "run.max_steps=4")
    path = tmp_path / "checkpoints/step-00000004/optimizer.safetensors"
    tensors = load_file(path)
    kept = {name: value for name, value in tensors.items() if not name.startswith("routing/")}
    assert len(tensors) - len(kept) == 3 * 2 * 2  # batches, micro-batches, learned routers
    assert all(v.dtype == torch.uint8 for n, v in tensors.items() if n.startswith("routing/"))
    save_file(kept, path)
    state = (path.parent / "state.json").read_text()
    import json

    changed = json.loads(state)
    changed["bytes"]["optimizer.safetensors"] = path.stat().st_size
    (path.parent / "state.json").write_text(json.dumps(changed))
    feed = TinyFeed()
    tiny_run(tmp_path, *settings, feed=feed, resume=True)
    assert feed.served == list(range(4, 10))
    ages = [r.get("routing_age") for r in records(tmp_path) if "loss" in r]
    assert ages == [None, None, 0, 1, 2, 3, None, None, None, None]
