"""`pull` against a Hub on loopback that drops connections, turns bits and refuses; the true one is not asked."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub, serving
from small_models import build, packable_config

from rorqual import checkpoint
from rorqual.checkpoint import hub as hub_module
from rorqual.cli import main
from rorqual.errors import CheckpointError

torch.set_num_threads(1)

FIRST = "model-00001-of-00006.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a repository holds: a checkpoint in six shards, and files that are not wanted."""
    folder = tmp_path_factory.mktemp("files")
    checkpoint.save_official(build(packable_config()), folder, experts="fp4", shard_bytes=1000)
    read = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**read, "README.md": b"# a model", "inference/config.json": b"{}", "figures.png": b"png"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with serving(FakeHub(dict(files))) as running:
        yield running


def pull(hub: FakeHub, folder: Path, **more: object) -> checkpoint.Pulled:
    return checkpoint.pull(hub.repository, folder, endpoint=hub.url, wait_s=0.001, **more)  # type: ignore[arg-type]


def wanted(hub: FakeHub) -> list[str]:
    return sorted(name for name in hub.files if name.endswith((".json", ".safetensors")) and "/" not in name)


def assert_whole(hub: FakeHub, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == wanted(hub)
    for name in wanted(hub):
        assert (folder / name).read_bytes() == hub.files[name], name
    assert checkpoint.summarise(folder).fits


def test_everything_arrives_and_is_checked(hub: FakeHub, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    done = pull(hub, tmp_path / "out", on_bytes=lambda _what, at, total: seen.append((at, total)))
    assert_whole(hub, tmp_path / "out")
    assert done.commit == COMMIT and len(done.sha256) == 6 and sorted(done.blob_id) == [
        "config.json", "model.safetensors.index.json",
    ]  # fmt: skip
    total = sum(len(hub.files[name]) for name in wanted(hub))
    assert (
        done.nbytes == total and seen[-1] == (total, total) and [at for at, _ in seen] == sorted(at for at, _ in seen)
    )
    assert [name for name, _ in hub.asked][-2:] == ["config.json", "model.safetensors.index.json"]  # last
    hub.asked.clear()
    again = pull(hub, tmp_path / "out")
    assert not hub.asked and len(again.kept) == 8 and not again.replaced


def test_dropped_connections_are_taken_up_where_they_broke(hub: FakeHub, tmp_path: Path):
    hub.faults[FIRST] = ["cut", "cut", "503", "cut"]
    pull(hub, tmp_path)
    assert_whole(hub, tmp_path)
    size, at, expected = len(hub.files[FIRST]), 0, []
    for fault in ["cut", "cut", "503", "cut", ""]:
        expected.append((FIRST, at))
        at += (size - at) // 2 if fault == "cut" else 0
    assert [one for one in hub.asked if one[0] == FIRST] == expected


def test_a_server_without_ranges_starts_over(hub: FakeHub, tmp_path: Path):
    hub.faults[FIRST] = ["cut", "no-range"]
    pull(hub, tmp_path)
    assert_whole(hub, tmp_path)


def test_a_line_that_stays_down_is_told_and_gone_on_from(hub: FakeHub, tmp_path: Path):
    hub.faults[FIRST] = ["cut"] + ["503"] * 6
    half = len(hub.files[FIRST]) // 2
    with pytest.raises(
        CheckpointError, match=rf"broke off at {half:,} of .* 5 retries brought nothing more.*goes on from"
    ):
        pull(hub, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoint.load_model(tmp_path) if (tmp_path / "model.safetensors").exists() else checkpoint.summarise(tmp_path)
    hub.asked.clear()
    pull(hub, tmp_path)
    assert hub.asked[0] == (FIRST, half)
    assert_whole(hub, tmp_path)


def test_wrong_bytes_are_fetched_again_once(hub: FakeHub, tmp_path: Path):
    hub.faults = {FIRST: ["flip"], "config.json": ["flip"]}
    pull(hub, tmp_path)
    assert_whole(hub, tmp_path)
    assert [at for name, at in hub.asked if name == FIRST] == [0, 0]
    other = "model-00002-of-00006.safetensors"
    (tmp_path / other).unlink()
    hub.faults = {other: ["flip", "flip"]}
    with pytest.raises(CheckpointError, match="arrived twice with the SHA-256 .* It was removed"):
        pull(hub, tmp_path)
    assert not [path for path in tmp_path.iterdir() if other in path.name]


def test_a_file_that_changed_since_is_fetched_again(hub: FakeHub, tmp_path: Path):
    pull(hub, tmp_path)
    data = bytearray((tmp_path / FIRST).read_bytes())
    data[-1] ^= 1
    (tmp_path / FIRST).write_bytes(data)
    done = pull(hub, tmp_path)
    assert done.replaced == [FIRST] and len(done.kept) == 7
    assert_whole(hub, tmp_path)


def test_bytes_of_another_revision_are_not_gone_on_with(hub: FakeHub, tmp_path: Path):
    hub.faults[FIRST] = ["cut"] + ["503"] * 6
    with pytest.raises(CheckpointError):
        pull(hub, tmp_path)
    hub.files[FIRST] = hub.files[FIRST][:-1] + b"\0"
    hub.asked.clear()
    pull(hub, tmp_path)
    assert hub.asked[0] == (FIRST, 0) and (tmp_path / FIRST).read_bytes() == hub.files[FIRST]


def test_refusals_name_their_cause(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.faults[FIRST] = ["cut", "403"]
    with pytest.raises(CheckpointError, match=r"the Hub refuses .* \(HTTP 403\).*HF_TOKEN"):
        pull(hub, tmp_path / "a")
    with pytest.raises(CheckpointError, match="the Hub does not show whales/other.*Check the id"):
        checkpoint.pull("whales/other", tmp_path / "b", endpoint=hub.url)
    with pytest.raises(CheckpointError, match="the Hub does not show whales/blue at v9"):
        pull(hub, tmp_path / "b", revision="v9")
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match="but its disk has 1,000 free"):
        pull(hub, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
    for name in list(hub.files):
        if name.endswith(".safetensors"):
            del hub.files[name]
    with pytest.raises(CheckpointError, match="has no .safetensors files"):
        pull(hub, tmp_path / "d")


@pytest.mark.slow
def test_the_command_reads_hf_endpoint(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [sys.executable, "-m", "rorqual", "pull", hub.repository]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checked: SHA-256 of 6 file(s), Git blob id of 2; all as the Hub says" in done.stdout
    assert COMMIT in done.stdout
    assert_whole(hub, tmp_path / "blue")
    for wrong, words in (("minke", "travels with the package"), ("no", "is no Hub id")):
        with pytest.raises(SystemExit) as ended:
            main(["pull", wrong, "--json"])
        assert ended.value.code == 2 and words in capsys.readouterr().err
