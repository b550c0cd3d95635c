"""Damaged, missing and contradictory weight files: each is refused with its name, the cause and the fix."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rorqual.checkpoint.safetensors_io import (
    INDEX,
    SINGLE,
    CheckpointFiles,
    read_header,
    write_checkpoint,
    write_text,
)
from rorqual.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor([3, 1], dtype=torch.int64),
}


def make(name: str) -> torch.Tensor:
    return TENSORS[name]


def sharded(folder: Path) -> Path:
    write_checkpoint(folder, [["a"], ["b", "c"]], make)
    return folder


def change_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [[["a", "b", "c"]], [["a"], ["b", "c"]], [["c"], ["a"], ["b"]]])
def test_what_is_written_is_read(tmp_path: Path, shards: list[list[str]]):
    paths = write_checkpoint(tmp_path, shards, make)
    assert len(paths) == len(shards)
    with CheckpointFiles(tmp_path) as files:
        assert set(files.tensors) == set(TENSORS)
        assert files.nbytes == 24 + 10 + 16
        assert files.tensors["b"].dtype == "BF16" and files.tensors["a"].shape == (2, 3)
        for name, tensor in TENSORS.items():
            assert torch.equal(files.read(name), tensor)


def test_index_has_the_published_form(tmp_path: Path):
    index = json.loads((sharded(tmp_path) / INDEX).read_text())
    assert index["metadata"] == {"total_size": 50}
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"]["c"] == "model-00002-of-00002.safetensors"


def test_saving_again_leaves_no_stale_or_temporary_file(tmp_path: Path):
    (tmp_path / "world.json").write_text("{}")
    sharded(tmp_path)
    write_checkpoint(tmp_path, [["a", "b", "c"]], make)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SINGLE, "world.json"]
    sharded(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {INDEX} and not (tmp_path / SINGLE).exists()


def test_a_failed_save_leaves_the_old_files(tmp_path: Path):
    write_checkpoint(tmp_path, [["a"]], make)

    def fail(name: str) -> torch.Tensor:
        if name == "b":
            raise OSError("No space left on device")
        return TENSORS[name] + 1

    with pytest.raises(CheckpointError, match="No space left on device. Check free space"):
        write_checkpoint(tmp_path, [["a"], ["b"]], fail)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    with CheckpointFiles(tmp_path) as files:
        assert torch.equal(files.read("a"), TENSORS["a"])


def test_shards_without_an_index_are_enough_when_all_are_there(tmp_path: Path):
    (sharded(tmp_path) / INDEX).unlink()
    with CheckpointFiles(tmp_path) as files:
        assert set(files.tensors) == set(TENSORS)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 shards that say they are of \[2\]: some are missing"):
        CheckpointFiles(tmp_path)


# ---------------------------------------------------------------- damage


def truncation_points(size: int, header: int) -> list[int]:
    return [0, 5, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, size - 7, size - 1]


def test_truncated_at_any_point_is_refused_with_the_bytes(tmp_path: Path):
    write_checkpoint(tmp_path, [["a", "b", "c"]], make)
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for cut in truncation_points(len(whole), header):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as caught:
            CheckpointFiles(tmp_path)
        text = str(caught.value)
        assert str(path) in text and f"{cut}" in text and "Copy or download the file again" in text
    assert f"{len(whole)} bytes expected" in text and "(1 missing)" in text


def test_trailing_bytes_are_refused(tmp_path: Path):
    write_checkpoint(tmp_path, [["a"]], make)
    with (tmp_path / SINGLE).open("ab") as file:
        file.write(b"xyz")
    with pytest.raises(CheckpointError, match="3 more than the .* its header describes: it is damaged"):
        CheckpointFiles(tmp_path)


def test_a_lfs_pointer_is_recognised(tmp_path: Path):
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        CheckpointFiles(tmp_path)


def header_file(path: Path, text: str, data: bytes = b"\0" * 8) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    return path


ENTRY = '{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("not json", "damaged header"),
        ("[1]", "header is not an object"),
        (f'{{"a": {ENTRY}, "a": {ENTRY}}}', "a is listed twice"),
        (
            f'{{"a": {ENTRY}, "b": {ENTRY}}}',
            "tensor b lies at bytes 0 to 8 of the data, but 8 bytes from 8 were expected",
        ),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "12 bytes from 0 were expected"),
        ('{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', r"impossible shape \[-2\]"),
        ('{"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}', "unknown dtype Q7"),
        ('{"a": {"dtype": "F32", "shape": [2]}}', "data_offsets"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, text: str, cause: str):
    with pytest.raises(CheckpointError, match=cause):
        read_header(header_file(tmp_path / SINGLE, text))


# ---------------------------------------------------------------- folders and indexes


def test_a_folder_without_weights(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"holds neither {SINGLE} nor {INDEX}"):
        CheckpointFiles(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        CheckpointFiles(tmp_path / "nowhere")


def test_a_missing_shard_is_named(tmp_path: Path):
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 1 of 2 files that are not there: model-00002-of-00002"):
        CheckpointFiles(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", "c:x.safetensors", "x.bin"]
)
def test_an_index_may_not_point_outside_its_folder(tmp_path: Path, name: str):
    folder = sharded(tmp_path / "inner")
    save_file({"a": TENSORS["a"]}, tmp_path / SINGLE)
    change_index(folder, a=name)
    with pytest.raises(CheckpointError, match="not a plain .safetensors file name"):
        CheckpointFiles(folder)


def test_an_index_that_disagrees_with_the_shards(tmp_path: Path):
    change_index(sharded(tmp_path), c="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"disagree on 1 tensors: c \(index: model-00001.*found in: model-00002"):
        CheckpointFiles(tmp_path)
    change_index(sharded(tmp_path), phantom="model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"phantom \(.*found in: no shard\)"):
        CheckpointFiles(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path):
    sharded(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor b is in both .*model-00001.* and .*model-00002"):
        CheckpointFiles(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_unusable_index(tmp_path: Path, text: str):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX}.*(usable index|plain .safetensors file name)"):
        CheckpointFiles(tmp_path)


def test_text_files_are_replaced_whole(tmp_path: Path):
    path = tmp_path / "config.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_files_are_readable_by_whom_the_umask_lets(tmp_path: Path):
    before = os.umask(0o022)
    try:
        written = write_checkpoint(tmp_path, [["a"], ["b", "c"]], make)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}
