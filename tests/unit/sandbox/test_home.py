"""The folder of a sandbox, when several look at it at once."""

import shutil
from pathlib import Path

import pytest

from rorqual.sandbox.home import Home


def test_a_folder_goes_although_a_sweep_looks_at_it_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home.make("container", tmp_path)
    remove, looks = shutil.rmtree, [0]

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        """As if the sweep opened the lock after the removal had passed it."""
        if looks[0] < 3:
            looks[0] += 1
            (path / "lock").unlink(missing_ok=True)
            assert Home(path).lock()
            return
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr("rorqual.sandbox.home.shutil.rmtree", rmtree)
    home.remove("closed")
    assert looks == [3] and not home.path.exists()
    assert (tmp_path / "sandboxes" / ".gone" / home.id).read_text() == "closed"
