"""A checkpoint in DeepSeek's own layout with the dimensions of V4-Flash, a few layers and random weights.

    python benchmarks/synthetic_checkpoint.py FOLDER [--layers 4] [--hash-layers 3]

Names, shapes, dtypes and shards are those of the released files (`rorqual.checkpoint.packed`), so whatever loads this
loads them. Layers are window, CSA, HCA, CSA, HCA and so on, the first ones hash-routed; no MTP. Four layers take
16.6 GB. Numbers are drawn so that activations stay finite: every matrix maps a vector of unit variance to one of about
unit variance. Written tensor by tensor: needs no more memory than the largest one (1 GB).
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from rorqual.checkpoint.layout import file_tensors, official_shards
from rorqual.checkpoint.packed import Stored, describe, stored_tensors
from rorqual.checkpoint.safetensors_io import INDEX, write_text
from rorqual.config import ModelConfig
from rorqual.planner import build_on_meta

PIECE = 1 << 26
"""Numbers drawn at a time."""
SAFETENSORS = {
    torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
FP4_SPREAD = 2.93
"""Standard deviation of the sixteen e2m1 values, all as likely."""
FP8_SPREAD = 64.0
"""That of the FP8 codes drawn here."""


def flash_config(layers: int = 4, hash_layers: int = 3) -> ModelConfig:
    """V4-Flash cut to a few layers, without MTP."""
    ratios = [0, *(4 if i % 2 == 0 else 128 for i in range(layers - 1))]
    flash = ModelConfig.preset("v4-flash").to_dict()
    changes = {"num_hidden_layers": layers, "compress_ratios": ratios, "num_nextn_predict_layers": 0}
    return ModelConfig.from_dict({**flash, **changes, "num_hash_layers": min(hash_layers, layers)})


def write(folder: Path, config: ModelConfig, seed: int = 0) -> int:
    """Write the checkpoint of `config`; returns its bytes. What the folder held before is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    state = build_on_meta(config).state_dict()
    tensors = file_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, lambda _stack: False)
    stored = {item.tensor.name: item for item in stored_tensors(tensors, state, "fp4")}
    shards = official_shards([item.tensor for item in stored.values()])
    draw, total = Draw(config, seed), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with path.open("wb") as file:
            total += write_shard(file, [stored[tensor.name] for tensor in shard], draw)
        weight_map |= {tensor.name: path.name for tensor in shard}
    write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}) + "\n")
    write_text(folder / "config.json", json.dumps(describe(config.to_dict(), "fp4"), indent=2) + "\n")
    return total


def write_shard(file: BinaryIO, items: list[Stored], draw: "Draw") -> int:
    """One file; tensors in the order of the safetensors library, wide dtypes first, then by name. Returns its bytes of
    data.
    """
    items = sorted(items, key=lambda item: (-item.dtype.itemsize, SAFETENSORS[item.dtype], item.tensor.name))
    header: dict[str, Any] = {}
    end = 0
    for item in items:
        size = math.prod(item.tensor.shape) * item.dtype.itemsize
        header[item.tensor.name] = {
            "dtype": SAFETENSORS[item.dtype], "shape": item.tensor.shape, "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for item in items:
        for piece in draw(item):
            file.write(piece.data)
    return end


class Draw:
    """The random numbers of a tensor, in pieces."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.random = np.random.Generator(np.random.SFC64(seed))
        normal = torch.erfinv(torch.linspace(-255, 255, 256) / 256) * math.sqrt(2)
        self.normal = normal.numpy()
        """256 numbers at equal steps of the normal distribution."""
        self.fp8 = (FP8_SPREAD * normal).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def __call__(self, item: Stored) -> Iterator[np.ndarray]:
        """Numbers of one stored tensor, as bytes would be read from a file."""
        name, shape = item.tensor.name, item.tensor.shape
        if name.endswith("tid2eid"):
            yield self._table(*shape)
            return
        make = self._maker(item)
        left = math.prod(shape)
        while left:
            yield make(min(left, PIECE))
            left -= min(left, PIECE)

    def _maker(self, item: Stored) -> Callable[[int], np.ndarray]:
        name, width = item.tensor.name, item.tensor.shape[-1]
        if item.is_scale:
            group, spread = (32, FP4_SPREAD) if item.kind == "fp4" else (128, FP8_SPREAD)
            exponent = round(-math.log2(math.sqrt(group * width) * spread))
            return lambda count: np.full(count, 127 + exponent, dtype=np.uint8)
        if item.kind == "fp4":
            return self._bytes
        if item.kind == "fp8":
            return lambda count: self.fp8[self._bytes(count)]
        if name.endswith("norm.weight"):
            table = 1 + 0.1 * self.normal
        elif name.endswith("_scale"):
            table = np.full(256, 0.5)
        else:
            spread = 1.0 if name == "embed.weight" else 0.1 if len(item.tensor.shape) == 1 else width**-0.5
            table = spread * self.normal
        numbers = torch.from_numpy(table).to(item.dtype)
        words = numbers.view(torch.int16 if item.dtype is torch.bfloat16 else torch.int32).numpy()
        return lambda count: words[self._bytes(count)]

    def _bytes(self, count: int) -> np.ndarray:
        return np.frombuffer(self.random.bytes(count), dtype=np.uint8)

    def _table(self, tokens: int, active: int) -> np.ndarray:
        """Different experts for every token: a first one and an odd step from it."""
        experts = self.config.n_routed_experts
        first = self.random.integers(experts, size=(tokens, 1))
        step = 2 * self.random.integers(experts // 2, size=(tokens, 1)) + 1
        return (first + step * np.arange(active)) % experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hash-layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.perf_counter()
    config = flash_config(args.layers, args.hash_layers)
    free = shutil.disk_usage(args.folder.parent if not args.folder.exists() else args.folder).free
    print(f"{free / 1e9:.0f} GB are free; writing {args.layers} layers", flush=True)
    total = write(args.folder, config, args.seed)
    print(f"{total / 1e9:.1f} GB in {time.perf_counter() - begin:.0f} s at {args.folder}")


if __name__ == "__main__":
    main()
