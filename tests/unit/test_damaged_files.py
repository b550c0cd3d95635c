"""Whatever is wrong with files, load, convert and pull say which one, why and what to do, and leave nothing half-done.

Property tests of single damaged bytes are in `property/test_checkpoint_damage.py`; retries of downloads in
`test_pull.py`; kill -9 in `test_convert.py`. A wrong bit inside the values of a file that was there before cannot be
seen by anyone who has no digest of it: `pull` has the Hub's.
"""

import errno
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, serving
from small_models import build, packable_config

import rorqual
from rorqual import checkpoint
from rorqual.errors import CheckpointError
from rorqual.tokenizer import Tokenizer

torch.set_num_threads(1)

SHARD = "model-00003-of-00006.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    checkpoint.save_official(build(packable_config()), folder, experts="fp4", shard_bytes=1000)
    return folder


def short(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 7)


def cut_in_header(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)


def empty(folder: Path) -> None:
    os.truncate(folder / SHARD, 0)


def longer(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"tail")


def pointer(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def header_bit(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[data.index(b'"shape"')] ^= 0xFF
    (folder / SHARD).write_bytes(data)


def absent(folder: Path) -> None:
    (folder / SHARD).unlink()


def wrong_index(folder: Path) -> None:
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"]["norm.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(document))


def cut_index(folder: Path) -> None:
    os.truncate(folder / INDEX, 50)


def escaping_index(folder: Path) -> None:
    document = json.loads((folder / INDEX).read_text())
    document["weight_map"]["norm.weight"] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(document))


def other_shard(folder: Path) -> None:
    shutil.copyfile(folder / "model-00002-of-00006.safetensors", folder / SHARD)


def cut_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 30)


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 32}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (short, rf"{SHARD} is truncated: [\d]+ bytes expected.*7 missing.*[Cc]opy or download"),
    (cut_in_header, rf"{SHARD} is truncated inside its header"),
    (empty, rf"{SHARD} has 0 bytes.*empty or truncated"),
    (longer, rf"{SHARD} has .* 4 more than"),
    (pointer, rf"{SHARD} begins with .*Git LFS pointer"),
    (header_bit, rf"{SHARD} has a damaged header"),
    (absent, rf"names 1 of 6 files that are not there: {SHARD}"),
    (wrong_index, "the shards disagree on 1 tensors: norm.weight"),
    (cut_index, f"{INDEX} is not a usable index"),
    (escaping_index, "is not a plain .safetensors file name"),
    (other_shard, "is in both|disagree on"),
    (cut_config, "config.json"),
    (other_config, r"do not fit.*experts.*\.w1\.weight has shape"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_load_and_convert_name_the_damage(good: Path, tmp_path: Path, damage: Callable[[Path], None], words: str):
    source = shutil.copytree(good, tmp_path / "source")
    damage(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for attempt in (
        lambda: checkpoint.load_model(source),
        lambda: checkpoint.convert(source, tmp_path / "target", "transformers"),
    ):
        with pytest.raises(rorqual.errors.RorqualError, match=f"(?s){words}") as raised:
            attempt()
        assert len(str(raised.value)) > 60
    assert not (tmp_path / "target").exists(), "a conversion that cannot be left a folder"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_wrong_tokenizer(good: Path, tmp_path: Path):
    """Of another vocabulary, or no tokenizer at all: inspect says so, and a load refuses before it reads weights."""
    folder = shutil.copytree(good, tmp_path / "source")
    shutil.copyfile(checkpoint.ASSETS / "minke" / "tokenizer.json", folder / "tokenizer.json")
    ids = Tokenizer.from_folder(folder).vocab_size
    vocabulary = packable_config().vocab_size
    assert ids > vocabulary
    found = checkpoint.summarise(folder)
    assert found.fits and found.tokenizer.is_right is False
    assert f"{ids} ids" in found.tokenizer.words and f"{vocabulary} embeddings" in found.tokenizer.words
    with pytest.raises(CheckpointError, match=f"has {ids} ids, the model only {vocabulary}"):
        rorqual.load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json is not JSON"):
        rorqual.load(folder)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()}); the injected error is tested")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_too_little_space_is_seen_before_anything_is_written(good: Path, small_disk: Path):
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes more, but its disk has [\d,]+ free"):
        checkpoint.convert(good, small_disk / "out", "transformers")
    assert names_in(small_disk / "out") == ["convert-progress.json"]
    with (
        serving(FakeHub({path.name: path.read_bytes() for path in good.iterdir()})) as hub,
        pytest.raises(CheckpointError, match="name a folder on another disk with --to"),
    ):
        checkpoint.pull(hub.repository, small_disk / "pulled", endpoint=hub.url)
    assert names_in(small_disk / "pulled") == []


def test_a_disk_that_fills_up_while_writing(good: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    """Somebody else takes the space that was there; once it is free again, both go on and end well."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    out, pulled = small_disk / "out", small_disk / "pulled"
    with pytest.raises(CheckpointError, match=r"disk of .* is full: model-0000.*finished files are kept") as raised:
        checkpoint.convert(good, out, "official", experts="fp8", shard_bytes=1000)
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__cause__.errno == errno.ENOSPC
    assert not list(out.glob(".*.tmp")) and not (out / "config.json").exists()
    finished = json.loads((out / "convert-progress.json").read_text())["files"]
    assert sorted(finished) == [name for name in names_in(out) if name.endswith(".safetensors")] != []
    with serving(FakeHub({path.name: path.read_bytes() for path in good.iterdir()})) as hub:
        with pytest.raises(CheckpointError, match="cannot be written to .*: the disk is full"):
            checkpoint.pull(hub.repository, pulled, endpoint=hub.url)
        assert not (pulled / "config.json").exists()
        for path in pulled.iterdir():
            assert path.suffix == ".part" or path.read_bytes() == (good / path.name).read_bytes()
        subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
        checkpoint.pull(hub.repository, pulled, endpoint=hub.url)
    assert {name: (pulled / name).read_bytes() for name in names_in(pulled)} == {
        path.name: path.read_bytes() for path in good.iterdir()
    }
    done = checkpoint.convert(good, out, "official", experts="fp8", shard_bytes=1000)
    assert done.kept == len(finished) and done.verified is not None and done.verified.is_lossless


@pytest.mark.parametrize("limit", [10, 5000, 300_000])
def test_an_injected_full_disk(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    """The same without a file system of its own: writing fails after so many bytes in all."""
    left = limit
    original: Callable[..., Any] = Path.open

    class Full(io.BufferedWriter):
        def write(self, data: Any) -> int:
            nonlocal left
            left -= len(data)
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        is_weights = mode == "wb" and ".safetensors" in path.name
        return Full(io.FileIO(path, "w")) if is_weights else original(path, mode, *args, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(CheckpointError, match="is full: model"):
        checkpoint.convert(good, tmp_path / "out", "official", shard_bytes=1000)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    monkeypatch.setattr(Path, "open", original)
    checkpoint.convert(good, tmp_path / "out", "official", shard_bytes=1000)
    for path in good.glob("model*"):
        if path.suffix == ".safetensors":
            assert checkpoint.summarise(tmp_path / "out").fits


def test_an_interrupted_download_is_no_checkpoint(good: Path, tmp_path: Path):
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    with serving(FakeHub(files)) as hub:
        hub.faults[SHARD] = ["cut"] + ["503"] * 6
        with pytest.raises(CheckpointError, match=f"download of {SHARD} broke off"):
            checkpoint.pull(hub.repository, tmp_path, endpoint=hub.url, wait_s=0.001)
    with pytest.raises(CheckpointError, match="no config.json|some are missing"):
        checkpoint.load_model(tmp_path)
