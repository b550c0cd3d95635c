"""A checkpoint goes as it came: whole or not at all, also when the deletion is cut short."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run

from rorqual.train import checkpoints

EVERY_STEP = ("run.checkpoint_every_s=1e-9", "run.keep_checkpoints=2")


class Killed(BaseException):
    """Stands for a SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("victims", [1, 2, 3])
def test_a_kill_during_deletion_leaves_no_half_checkpoint(
    victims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = shutil.rmtree, []

    def dies_half_way(path: Path, *args: Any, **kwargs: Any) -> None:
        if "step-" in Path(path).name:
            seen.append(path)
            if len(seen) == victims:
                sorted(Path(path).iterdir())[-1].unlink()
                raise Killed
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", dies_half_way)
    with pytest.raises(Killed):
        tiny_run(tmp_path, *EVERY_STEP)
    left = checkpoints.folders(tmp_path)
    assert left and [checkpoints.read(path).folder for path in left] == left
    monkeypatch.setattr(shutil, "rmtree", real)
    tiny_run(tmp_path, *EVERY_STEP, resume=True)
    assert len(checkpoints.folders(tmp_path)) == 2
    assert not list((tmp_path / "checkpoints").glob(".*"))
