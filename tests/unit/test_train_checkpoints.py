"""Checkpoints on disk: complete or absent, the newest sound one wins, damage is named; metrics."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from rorqual.errors import CheckpointError
from rorqual.train import checkpoints
from rorqual.train.checkpoints import Progress
from rorqual.train.report import Metrics, duration
from rorqual.train.run_plots import save_plot


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
    assert save_plot(tmp_path)
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (65, "1m 05s"), (3700, "1h 01m"), (-1, "0s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def damage(checkpoint: Path) -> None:
    weights = checkpoint / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def test_when_all_are_damaged_nothing_is_started_over(tmp_path: Path) -> None:
    damage(save(tmp_path, 1))
    (save(tmp_path, 2) / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"(?s)None of the 2 checkpoints .*it is damaged.*Restore one"):
        checkpoints.newest(tmp_path)


def test_pruning_spares_the_one_just_written_and_what_could_not_be_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 9))
    save(tmp_path, 2, keep=1)
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-00000002", "step-00000009"]
    for step in (3, 4):
        save(tmp_path, step, keep=4)
    assert len(checkpoints.complete(tmp_path)) == 4


def test_a_kill_while_a_step_is_saved_again_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    save(tmp_path, 5)
    real, renames = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        renames.append(target.name)
        if len(renames) == 2:
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Killed):
        save(tmp_path, 5)
    monkeypatch.undo()
    saved = checkpoints.newest(tmp_path)
    assert saved is not None and saved.folder.name == "step-00000005-old" and saved.progress.step == 5
    save(tmp_path, 5)
    assert [path.name for path in checkpoints.folders(tmp_path)] == ["step-00000005"]


def test_the_librarys_own_errors_are_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("rorqual.train.checkpoints.save_tensors", full)
    with pytest.raises(CheckpointError, match="No space left.*earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_checkpoints_are_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {(folder / name).stat().st_mode & 0o777 for name in ("weights.safetensors", "state.json")} == {0o640}
