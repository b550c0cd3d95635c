"""Checkpoints on disk: complete or absent, the newest sound one wins, damage is named; metrics."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rorqual.errors import CheckpointError
from rorqual.train import checkpoints
from rorqual.train.checkpoints import Progress
from rorqual.train.report import Metrics, duration, save_plot


def save(folder: Path, step: int, keep: int = 10) -> Path:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, float(step))
    momentum = {"muon/weight": torch.full((2, 3), float(step))}
    return checkpoints.save(folder, model, momentum, {"at": step}, Progress(step, step * 10, 1.5), {"k": 1}, keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 3)
    saved = checkpoints.newest(tmp_path)
    assert saved is not None
    assert saved.progress == Progress(3, 30, 1.5) and saved.feed == {"at": 3} and saved.config == {"k": 1}
    assert torch.equal(saved.weights["weight"], torch.full((2, 3), 3.0))
    assert set(saved.optimizer) == {"muon/weight"}
    assert torch.equal(saved.torch_rng, torch.get_rng_state())


def test_only_the_newest_are_kept_and_drafts_are_never_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    draft = tmp_path / "checkpoints" / ".draft-00000009"
    draft.mkdir()
    (draft / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "step-00000009").mkdir()  # no state.json
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002", "step-00000003"]
    save(tmp_path, 4, keep=2)
    assert not draft.exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights.safetensors has \d+ bytes, but \d+ were written"):
        checkpoints.read(weights.parent)
    saved = checkpoints.newest(tmp_path)
    assert saved is not None and saved.progress.step == 1
    assert "Trying the one before it" in caplog.text


def test_another_format_is_refused(tmp_path: Path) -> None:
    state = save(tmp_path, 1) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this version reads 1"):
        checkpoints.read(state.parent)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="Cannot write the checkpoint .*earlier checkpoints are intact"):
        save(tmp_path, 1)


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics = Metrics(path, resume_step=2)
    metrics.write({"step": 3, "again": True})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_plot_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": i, "tokens": i * 100, "lm": 5.0 - i / 10} for i in range(1, 20)]
    records.append({"step": 19, "tokens": 1900, "held_out_loss": 3.2})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert save_plot(tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png")
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (65, "1m 05s"), (3700, "1h 01m"), (-1, "0s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
