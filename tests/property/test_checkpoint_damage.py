"""A damaged weight file is refused with a CheckpointError, or read where only values changed."""

import tempfile
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rorqual.checkpoint.safetensors_io import SINGLE, CheckpointFiles, write_checkpoint
from rorqual.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
}


def written() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_checkpoint(folder, [list(TENSORS)], TENSORS.__getitem__)[0].read_bytes()


WHOLE = written()
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")


def read(content: bytes) -> dict[str, torch.Tensor] | None:
    """All tensors, or None when the file was refused."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SINGLE).write_bytes(content)
        try:
            with CheckpointFiles(folder) as files:
                return {name: files.read(name).clone() for name in files.tensors}
        except CheckpointError as error:
            assert SINGLE in str(error)
            return None


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_every_truncation_is_refused(length: int):
    assert read(WHOLE[:length]) is None


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
@example(0, 255)
def test_a_changed_byte_never_crashes_otherwise(position: int, change: int):
    content = bytearray(WHOLE)
    content[position] ^= change
    found = read(bytes(content))
    if position >= HEADER:
        assert found is not None and found.keys() == TENSORS.keys()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64))
@example(b"[" * 100_000)
def test_any_header_is_refused_or_read(header: bytes):
    read(len(header).to_bytes(8, "little") + header)


def test_the_whole_file_is_read():
    found = read(WHOLE)
    assert found is not None and all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
