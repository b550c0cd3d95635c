"""Gradients of one step: micro-batches forwarded and added up, in this process or shared out among several.

A small model on a CPU spends much of its time between operations, where more threads do not help; several
processes of one thread each do. They share one copy of the weights (a memory-mapped file), each adds up
gradients in its own shared buffer, and the main process sums the buffers in order, so results do not depend
on timing. No sockets are used.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.errors import RorqualError
from rorqual.train import losses
from rorqual.train.feed import Rows


@dataclass(frozen=True)
class Numerics:
    """How a micro-batch is computed."""

    dtype: torch.dtype
    loss_chunk: int
    threads: int


def accumulate(
    model: nn.Module,
    batches: Sequence[Rows],
    weights: Sequence[losses.LossWeights],
    *,
    dense: bool,
    numerics: Numerics,
) -> list[losses.LossParts]:
    """Forward and backward each micro-batch; gradients add up on the parameters."""
    device = next(model.parameters()).device
    parts = []
    for batch, weight in zip(batches, weights, strict=True):
        with autocast(device.type, numerics.dtype):
            loss, part = losses.compute(
                model,
                batch.to(device),
                weight,
                dense=dense,
                chunk=numerics.loss_chunk,
                dtype=numerics.dtype,
            )
        torch.autograd.backward(loss)
        parts.append(part)
    return parts


def autocast(device_type: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products on an accelerator where `dtype` asks for them, otherwise nothing.

    On a CPU the trunk stays fp32: small layers lose more in casts than they gain, and the native operations
    are fp32. Only the output head, the largest product, follows `dtype` there.
    """
    if dtype == torch.float32 or device_type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=dtype)


class Pool:
    """Worker processes around one shared copy of a model's weights. Use as a context manager.

    Making a Pool with workers moves the parameters and float buffers of `model` into shared memory, so build
    optimizers after it. Without workers it leaves the model as it is, on any device.
    Raises: RorqualError when a worker does not start.
    """

    def __init__(self, model: nn.Module, cfg: ModelConfig, num_workers: int, numerics: Numerics) -> None:
        self.model = model
        self.numerics = numerics
        self._links: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        self._gradients: list[list[Tensor]] = []
        self._folder: Path | None = None
        if num_workers:
            try:
                self._start(cfg, num_workers)
            except BaseException:
                self.close()
                raise

    def _start(self, cfg: ModelConfig, num_workers: int) -> None:
        model = self.model
        shared_memory = Path("/dev/shm")
        size = sum(p.numel() * 4 for p in model.parameters()) * (num_workers + 1) + (1 << 20)
        roomy = shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > size
        self._folder = Path(tempfile.mkdtemp(prefix="rorqual-train-", dir=shared_memory if roomy else None))
        share_weights(model, self._folder / "weights", is_new=True)
        static = {k: v.numpy() for k, v in model.named_buffers() if not v.dtype.is_floating_point}
        context = multiprocessing.get_context("spawn")
        for rank in range(1, num_workers + 1):
            here, there = context.Pipe()
            path = self._folder / f"gradients-{rank}"
            self._gradients.append(_map_gradients(model, path, is_new=True))
            process = context.Process(
                target=_serve,
                args=(there, cfg, static, self._folder / "weights", path, self.numerics),
                daemon=True,
            )
            process.start()
            there.close()
            self._links.append(here)
            self._processes.append(process)
        for rank in range(1, num_workers + 1):
            answer = self._receive(rank)
            if answer is not None:
                raise RorqualError(
                    f"Training process {rank + 1} of {num_workers + 1} did not start: {answer}. The steps cannot be "
                    "shared out. Train with run.processes=1."
                )
        # Everybody has mapped the files. Without a name they last as long as the mappings, however the run ends.
        self._remove_folder()

    def _receive(self, rank: int) -> Any:
        """The next answer of worker `rank` (from 1), or the reason why there is none."""
        try:
            return self._links[rank - 1].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank - 1].join(timeout=10)
            return f"it ended with exit code {self._processes[rank - 1].exitcode}"

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accumulate(
        self, batches: Sequence[Rows], weights: Sequence[losses.LossWeights], *, dense: bool
    ) -> list[losses.LossParts]:
        """As the function `accumulate`, with micro-batch i computed by process i modulo the number of
        processes.
        """
        n = len(self._links) + 1
        for rank, link in enumerate(self._links, start=1):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # noticed when it does not answer
                link.send((_pack(batches[rank::n]), list(weights[rank::n]), dense))
        shares = [accumulate(self.model, batches[::n], weights[::n], dense=dense, numerics=self.numerics)]
        for rank in range(1, n):
            answer = self._receive(rank)
            if isinstance(answer, str):
                raise RorqualError(
                    f"Training process {rank} of {n} failed: {answer}. The step cannot be completed without "
                    "its share. Continue with --resume, or with run.processes=1."
                )
            shares.append(answer)
        with torch.no_grad():
            for gradients in self._gradients:
                for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                    if parameter.grad is None:
                        parameter.grad = gradient.clone()
                    else:
                        parameter.grad.add_(gradient)
        return [shares[i % n][i // n] for i in range(len(batches))]

    def close(self) -> None:
        """End the workers and remove the shared memory (this process keeps its mapping)."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(None)
            link.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._links, self._processes = [], []
        self._remove_folder()


def share_weights(model: nn.Module, path: Path, *, is_new: bool) -> None:
    """Move parameters and float buffers into a memory-mapped file; with `is_new` False, take the file's
    values.
    """
    tensors = [*model.parameters(), *(b for _, b in _float_buffers(model))]
    views = _views(path, [t.shape for t in tensors])
    for tensor, view in zip(tensors, views, strict=True):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise AssertionError("shared weights are float32 on the CPU")
        if is_new:
            view.copy_(tensor.detach())
        tensor.data = view


def _float_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that training changes (the router biases)."""
    return ((name, b) for name, b in model.named_buffers() if name.endswith(".gate.bias"))


def _views(path: Path, shapes: list[torch.Size]) -> list[Tensor]:
    # Each tensor starts on a cache line (16 floats), as torch's own allocations do.
    padded = [-(-shape.numel() // 16) * 16 for shape in shapes]
    flat = torch.from_file(str(path), shared=True, size=sum(padded), dtype=torch.float32)
    return [piece[: shape.numel()].view(shape) for piece, shape in zip(flat.split(padded), shapes, strict=True)]


def _map_gradients(model: nn.Module, path: Path, *, is_new: bool) -> list[Tensor]:
    views = _views(path, [p.shape for p in model.parameters()])
    if is_new:
        for view in views:
            view.zero_()
    return views


def _pack(batches: Sequence[Rows]) -> list[tuple[Any, ...]]:
    """Tensors as arrays: torch would pass them through file descriptors."""
    return [
        (b.tokens.numpy(), b.labels.numpy(), None if b.segment_ids is None else b.segment_ids.numpy(), b.lengths)
        for b in batches
    ]


def _unpack(packed: list[tuple[Any, ...]]) -> list[Rows]:
    return [
        Rows(torch.from_numpy(t), torch.from_numpy(y), None if s is None else torch.from_numpy(s), lengths)
        for t, y, s, lengths in packed
    ]


def _serve(
    link: Connection,
    cfg: ModelConfig,
    static: dict[str, Any],
    weights: Path,
    gradients: Path,
    numerics: Numerics,
) -> None:
    """A worker's life: build the model around the shared weights, then answer steps until the pipe closes."""
    from rorqual.model import Transformer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then closes the pipe
    os.environ.setdefault("RANK", "1")  # quiet
    prepare_process(numerics.threads)
    model = Transformer(cfg, seed=None)
    share_weights(model, weights, is_new=False)
    for name, array in static.items():
        model.get_buffer(name).copy_(torch.from_numpy(array))
    model.train()
    views = _map_gradients(model, gradients, is_new=False)
    for parameter, view in zip(model.parameters(), views, strict=True):
        parameter.grad = view
    with contextlib.suppress(BrokenPipeError, OSError):
        link.send(None)  # everything is mapped
    while True:
        try:
            request = link.recv()
        except (EOFError, OSError):
            return
        if request is None:
            return
        packed, loss_weights, dense = request
        answer: Any
        try:
            for view in views:
                view.zero_()
            answer = accumulate(model, _unpack(packed), loss_weights, dense=dense, numerics=numerics)
            for parameter, view in zip(model.parameters(), views, strict=True):
                assert parameter.grad is view, "gradients must add up in the shared buffer"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        try:
            link.send(answer)
        except (BrokenPipeError, OSError):
            return


def prepare_process(threads: int) -> None:
    """Fix what results could depend on: the thread count, and operations whose order is otherwise free."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
