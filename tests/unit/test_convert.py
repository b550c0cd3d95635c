"""Converting checkpoints: byte-exact round trips, bounded reading, kill -9 and resume, refusals, what a cast loses."""

import json
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import build, packable_config
from torch import Tensor

from rorqual import checkpoint
from rorqual.checkpoint import conversion_progress, piecewise
from rorqual.checkpoint.pieces import SCALES, Piece, Source
from rorqual.checkpoint.piecewise import Entry, write_streamed
from rorqual.cli import main
from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops import quant

torch.set_num_threads(1)

CONFIG = packable_config()
TOKENS = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(2))
LAYERED = 1000
"""Shard limit below which the official layout has one file a layer."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP4 and FP8 checkpoint in one shard a layer, as released."""
    folder = tmp_path_factory.mktemp("packed")
    checkpoint.save_official(build(CONFIG), folder, experts="fp4", shard_bytes=LAYERED)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network in fp32."""
    folder = tmp_path_factory.mktemp("plain")
    checkpoint.save_official(build(CONFIG), folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        out |= load_file(path)
    return out


def raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    assert [name for name in first if raw(first[name]) != raw(second[name])] == []
    assert json.loads((a / "config.json").read_text()) == json.loads((b / "config.json").read_text())


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_official_to_transformers_and_back_is_the_same_bits(tmp_path: Path, experts):
    checkpoint.save_official(build(CONFIG), tmp_path / "a", experts=experts, shard_bytes=LAYERED)
    there = checkpoint.convert(tmp_path / "a", tmp_path / "b", "transformers")
    assert there.verified is not None and there.verified.is_lossless
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "b").values()} == {
        torch.bfloat16, torch.float32, torch.int64,
    }  # fmt: skip
    back = checkpoint.convert(tmp_path / "b", tmp_path / "c", "official", experts=experts, shard_bytes=LAYERED)
    assert back.verified is not None and back.verified.is_lossless
    assert_same_bits(tmp_path / "a", tmp_path / "c")
    with torch.no_grad():
        expected = checkpoint.load_model(tmp_path / "a")(TOKENS)
        assert torch.equal(checkpoint.load_model(tmp_path / "b")(TOKENS), expected)


def test_every_code_times_every_scale_is_exact_in_bf16_but_for_extreme_scales():
    """All 256 FP8 and 16 FP4 codes under all 255 scales: bf16 holds the products for exponents -124..119 and for FP4
    -127..125; beyond, the products leave bf16's range.
    """
    exponents = torch.arange(255, dtype=torch.int32) - 127
    scales = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    fp8 = fp8[~fp8.float().isnan()]
    fp4 = torch.tensor(quant.FP4_VALUES)
    for values, low, high in ((fp8.double(), -124, 119), (fp4.double(), -127, 125)):
        true = values[None] * torch.exp2(exponents.double())[:, None]
        held = (values[None].float() * quant.decode_e8m0(scales)[:, None]).to(torch.bfloat16)
        exact = (held.double() == true).all(1) & (torch.signbit(held) == torch.signbit(true)).all(1)
        assert exponents[exact].tolist() == list(range(low, high + 1))


def test_scales_are_carried_because_the_rule_may_pick_others(tmp_path: Path):
    """An expert scaled by hand with twice the rule's scale: its codes come back only with the scales beside."""
    checkpoint.save_official(build(CONFIG), tmp_path / "a", experts="fp4")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    name = "layers.1.ffn.experts.2.w1"
    scale = tensors[f"{name}.scale"].view(torch.uint8)
    codes = torch.randint(-3, 4, (96, 160), generator=torch.Generator().manual_seed(4)).div(2)  # magnitudes up to 1.5
    tensors[f"{name}.weight"] = quant.pack_fp4(codes)
    tensors[f"{name}.scale"] = (scale + 1).view(torch.float8_e8m0fnu)
    entries = [Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    by_width = sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)
    write_streamed(path, entries, [tensors[key] for key in by_width])

    checkpoint.convert(tmp_path / "a", tmp_path / "b", "transformers")
    checkpoint.convert(tmp_path / "b", tmp_path / "c", "official", experts="fp4")
    assert_same_bits(tmp_path / "a", tmp_path / "c")
    (tmp_path / "b" / SCALES).unlink()
    bare = checkpoint.convert(tmp_path / "b", tmp_path / "d", "official", experts="fp4")
    assert bare.verified is not None and bare.verified.is_lossless  # the numbers are the same all the same
    other = tensors_of(tmp_path / "d")
    assert raw(other[f"{name}.scale"]) != raw(tensors[f"{name}.scale"])


@pytest.mark.parametrize("to", ["official", "transformers"])
def test_plain_checkpoints_keep_their_dtype(plain: Path, tmp_path: Path, to):
    done = checkpoint.convert(plain, tmp_path / "out", to)
    assert done.verified is not None and done.verified.is_lossless and not (tmp_path / "out" / SCALES).exists()
    if to == "official":
        assert_same_bits(plain, tmp_path / "out")
    else:
        checkpoint.convert(tmp_path / "out", tmp_path / "back", "official")
        assert_same_bits(plain, tmp_path / "back")


def test_what_a_cast_loses_is_told(plain: Path, tmp_path: Path):
    done = checkpoint.convert(plain, tmp_path / "b", "official", dtype=torch.bfloat16)
    before, after = tensors_of(plain), tensors_of(tmp_path / "b")
    changed = {name: before[name] for name in before if not torch.equal(before[name].double(), after[name].double())}
    assert done.verified is not None and list(done.verified.loss) == ["float32 -> bfloat16"]
    loss = done.verified.loss["float32 -> bfloat16"]
    assert loss.tensors == len(changed) and done.verified.exact == len(before) - len(changed)
    assert loss.values == sum(int((t.double() != after[n].double()).sum()) for n, t in changed.items())
    relative = {
        n: float((t.double() - after[n].double()).abs().max() / t.double().abs().max()) for n, t in changed.items()
    }
    assert loss.largest_relative == max(relative.values()) == relative[loss.worst] <= 2.0**-8
    packed = checkpoint.convert(plain, tmp_path / "p", "official", experts="fp4")
    assert packed.verified is not None
    assert set(packed.verified.loss) == {"float32 -> fp4", "float32 -> fp8", "float32 -> bfloat16"}
    saved = tmp_path / "saved"
    checkpoint.save_official(checkpoint.load_official(plain), saved, experts="fp4")
    assert_same_bits(saved, tmp_path / "p")


def test_a_matrix_at_a_time(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fused stacks are never read or made whole, in either direction."""
    checkpoint.convert(packed, tmp_path / "b", "transformers", verify=False)
    seen: list[int] = []
    original_read, original_write = Source.read, piecewise._chunks

    def read(self: Source, piece: Piece) -> Tensor:
        value = original_read(self, piece)
        seen.append(value.nbytes)
        return value

    def chunks(header: bytes, pieces: Iterable[Tensor]) -> Iterator[Any]:
        for chunk in original_write(header, pieces):
            seen.append(len(chunk))
            yield chunk

    monkeypatch.setattr(Source, "read", read)
    monkeypatch.setattr(piecewise, "_chunks", chunks)
    checkpoint.convert(tmp_path / "b", tmp_path / "c", "official", experts="fp4")
    largest = max(t.nbytes for name, t in tensors_of(tmp_path / "b").items() if ".experts." not in name)
    stacks = [t for name, t in tensors_of(tmp_path / "b").items() if name.endswith("gate_up_proj")]
    one_expert = max(t.nbytes // t.shape[0] for t in stacks)
    assert seen and max(seen) <= max(largest, one_expert) < max(t.nbytes for t in stacks)


# ---------------------------------------------------------------- interruptions


def killed_at(source: Path, target: Path, what: str, share: float) -> None:
    """Convert in a child that ends itself with SIGKILL at that share of the writing or the verification."""
    child = os.fork()
    if child == 0:

        def end(doing: str, done: int, total: int) -> None:
            if doing == what and done >= share * total:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            checkpoint.convert(source, target, "official", experts="fp8", shard_bytes=LAYERED, on_bytes=end)
        finally:
            os._exit(7)  # it was to be killed before
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_anywhere_it_goes_on_and_ends_the_same(packed: Path, tmp_path: Path):
    checkpoint.convert(packed, tmp_path / "whole", "official", experts="fp8", shard_bytes=LAYERED)
    target, seen_partial = tmp_path / "target", False
    inodes: dict[str, int] = {}
    for what, share in [
        ("write", 0.02),
        ("write", 0.4),
        ("write", 0.75),
        ("write", 0.99),
        ("verify", 0.1),
        ("verify", 0.9),
    ]:
        killed_at(packed, target, what, share)
        seen_partial |= any(target.glob(".*.tmp"))
        if what == "write":
            assert not (target / "config.json").exists()
            with pytest.raises(CheckpointError):
                checkpoint.load_model(target)
        finished = json.loads((target / "convert-progress.json").read_text())["files"]
        for name, inode in inodes.items():
            assert (target / name).stat().st_ino == inode, "a finished file was written again"
        inodes = {name: (target / name).stat().st_ino for name in finished}
    assert seen_partial and len(inodes) == 6
    done = checkpoint.convert(packed, target, "official", experts="fp8", shard_bytes=LAYERED)
    assert done.kept == 6 and done.verified is not None and done.verified.is_lossless
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (target / path.name).read_bytes(), path.name


def test_a_finished_file_that_was_damaged_since_is_written_again(packed: Path, tmp_path: Path):
    target = tmp_path / "target"
    killed_at(packed, target, "write", 0.75)
    first = target / "model-00001-of-00006.safetensors"
    good = first.read_bytes()
    first.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    finished = len(json.loads((target / "convert-progress.json").read_text())["files"])
    done = checkpoint.convert(packed, target, "official", experts="fp8", shard_bytes=LAYERED)
    assert first.read_bytes() == good and done.kept == finished - 1


def test_verification_finds_a_bit_that_the_disk_turned(packed: Path, tmp_path: Path):
    target = tmp_path / "target"
    path = target / "model.safetensors"

    def turn_a_bit(what: str, done: int, total: int) -> None:
        if what == "write" and done == total:
            data = bytearray(path.read_bytes())
            data[-5] ^= 4
            path.write_bytes(data)

    with pytest.raises(CheckpointError, match="does not read back as it was written.*Run the same command"):
        checkpoint.convert(packed, target, "official", on_bytes=turn_a_bit)
    assert not path.exists()
    checkpoint.convert(packed, target, "official")
    assert_same_bits(packed, target)


# ---------------------------------------------------------------- refusals


def test_refusals(packed: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="the target is the source"):
        checkpoint.convert(packed, packed / ".." / packed.name, "transformers")
    with pytest.raises(CheckpointError, match="already holds model.safetensors, config.json"):
        checkpoint.convert(packed, plain, "transformers")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "tokenizer.json").write_text("another model's")
    with pytest.raises(CheckpointError, match="already holds tokenizer.json"):
        checkpoint.convert(packed, tmp_path / "taken", "transformers")
    for names in (["", str(tmp_path / "x")], [str(packed), ""]):
        with pytest.raises(SystemExit):
            main(["convert", *names, "--to", "official"])
        assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="fused experts have no packed form"):
        checkpoint.convert(plain, tmp_path / "x", "transformers", experts="fp4")
    with pytest.raises(ConfigError, match="Leave one of them out"):
        checkpoint.convert(plain, tmp_path / "x", "official", experts="fp4", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="float32 or bfloat16, not in torch.float16"):
        checkpoint.convert(plain, tmp_path / "x", "official", dtype=torch.float16)
    assert not (tmp_path / "x").exists()
    killed_at(packed, tmp_path / "half", "write", 0.5)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source or with other options"):
        checkpoint.convert(packed, tmp_path / "half", "official", shard_bytes=LAYERED)
    monkeypatch.setattr(
        conversion_progress.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 0, 1000)
    )
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes more, but its disk has 1,000 free"):
        checkpoint.convert(plain, tmp_path / "small", "official")
    assert not list((tmp_path / "small").glob("*.safetensors"))


def test_two_at_once_are_kept_apart(plain: Path, tmp_path: Path):
    def second(_what: str, done: int, total: int) -> None:
        if done < total:
            return
        with pytest.raises(CheckpointError, match="another process is converting into"):
            checkpoint.convert(plain, tmp_path / "out", "official", verify=False)

    checkpoint.convert(plain, tmp_path / "out", "official", verify=False, on_bytes=second)


def test_what_lies_beside_the_weights_is_copied_byte_by_byte(plain: Path, tmp_path: Path):
    shutil.copytree(plain, tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_bytes(b'{"name": "caf\xe9"}\r\n')
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "official")
    assert (tmp_path / "b" / "tokenizer_config.json").read_bytes() == b'{"name": "caf\xe9"}\r\n'


def test_a_drafter_can_be_dropped(plain: Path, tmp_path: Path):
    shutil.copytree(plain, tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    entries = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
    entries["mtp.0.markov_head.weight"] = torch.zeros(4, 4)
    by_width = sorted(entries, key=lambda key: -entries[key].dtype.itemsize)
    write_streamed(
        path, [Entry(k, t.dtype, tuple(t.shape)) for k, t in entries.items()], [entries[k] for k in by_width]
    )
    with pytest.raises(CheckpointError, match="DSpark drafter"):
        checkpoint.convert(tmp_path / "a", tmp_path / "b", "official")
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "official", drop_mtp=True)
    model = checkpoint.load_model(tmp_path / "b")
    assert len(model.mtp) == 0 and torch.equal(model.state_dict()["norm.weight"], tensors["norm.weight"])


def test_the_command(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["convert", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, _ = run(str(packed), str(tmp_path / "b"), "--to", "transformers")
    assert code == 0 and "184 of 184 matrices exact" in out and "nothing was lost" in out
    code, out, _ = run(str(packed), str(tmp_path / "c"), "--to", "official", "--dtype", "bfloat16", "--json")
    told = json.loads(out)
    assert code == 0 and told["files"] == ["model.safetensors"] and told["verified"]["loss"] == {}
    assert told["nbytes"] == (tmp_path / "c" / "model.safetensors").stat().st_size
    code, _, err = run(str(packed), str(packed), "--to", "official")
    assert code == 2 and "the target is the source" in err
