"""One rank of `expert_exchange.py`: runs one MoE layer's routed experts, forward and backward, as it is told.

Reads requests from standard input and answers on standard output, a JSON line each:

    {"build": {...}}                              draws tokens, routing and weights; connects to the other rank
    {"run": {"waves": W, "part": PART}}           one step; PART is

        step     the layer
        compute  the same products on the same rows, with a transport that delivers nothing
        comm     the same messages around experts of width 0, which cost nothing
        pack     both: what remains is the copying before and after messages
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.parallel import exchange, routes
from rorqual.parallel.exchange import ExpertExchange


class SilentPost(exchange._Post):
    """A transport that sends nothing and finds everything delivered: row numbers as a real run left them, and vectors
    that are whatever lay there (their values do not matter to a clock).
    """

    notes: ClassVar[list[Tensor]] = []

    def expect(self, pieces: list[Tensor]) -> exchange._Delivery:
        if pieces[0].dtype is torch.int32:
            for piece, note in zip(pieces, self.notes, strict=True):
                piece.copy_(note)
        delivery = exchange._Delivery([])
        delivery.has_arrived = True
        return delivery

    def send(self, pieces: list[Tensor], delivery: exchange._Delivery) -> None:
        pass


class NotingPost(exchange._Post):
    """The real transport; keeps what `SilentPost` needs."""

    notes: ClassVar[list[Tensor]] = []

    def expect(self, pieces: list[Tensor]) -> exchange._Delivery:
        if pieces[0].dtype is torch.int32:
            NotingPost.notes = pieces
        return super().expect(pieces)


class Layer:
    """The routed experts of one layer, this rank's tokens and their choices."""

    def __init__(self, tokens: int, hidden: int, width: int, experts: int, active: int, dtype: str) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(rank)
        kind, here = getattr(torch, dtype), experts // ranks

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(kind)

        self.x = draw(tokens, hidden).requires_grad_()
        self.dy = draw(tokens, hidden).float()
        self.chosen = torch.rand(tokens, experts, generator=generator).topk(active).indices
        self.weights = torch.rand(tokens, active, generator=generator).requires_grad_()
        self.full = tuple(
            (draw(*shape) / shape[-1] ** 0.5).requires_grad_()
            for shape in ((here, width, hidden), (here, width, hidden), (here, hidden, width))
        )
        self.empty = tuple(
            draw(*shape).requires_grad_() for shape in ((here, 0, hidden), (here, 0, hidden), (here, hidden, 0))
        )
        self._plans: dict[int, Any] = {}

    def run(self, waves: int, part: str) -> dict[str, float]:
        """One step: seconds of the forward and the backward pass, and processor seconds."""
        w1, w3, w2 = self.empty if part in ("comm", "pack") else self.full
        layer = ExpertExchange(dist.group.WORLD, waves=waves)
        for tensor in (self.x, self.weights, w1, w3, w2):
            tensor.grad = None
        with self._transport(waves, silent=part in ("compute", "pack")):
            dist.barrier()
            start, cpu, own, waiting = time.perf_counter(), time.process_time(), time.thread_time(), _waiting()
            y = layer(self.x, self.chosen, self.weights, w1, w3, w2, 10.0)
            middle = time.perf_counter()
            y.backward(self.dy)
            end = time.perf_counter()
            cpu, own = time.process_time() - cpu, time.thread_time() - own
            waited = _waiting() - waiting
        return {"forward": middle - start, "backward": end - middle, "cpu": cpu, "main_cpu": own, "waited": waited}

    @contextlib.contextmanager
    def _transport(self, waves: int, *, silent: bool) -> Iterator[None]:
        if not silent:
            yield
            return
        if waves not in self._plans:
            self._plans[waves] = self._record(waves)
        known, notes = self._plans[waves]
        SilentPost.notes = notes
        with mock.patch.object(exchange, "_Post", SilentPost), mock.patch.object(exchange, "plan", lambda *_: known):
            yield

    def _record(self, waves: int) -> tuple[Any, list[Tensor]]:
        """The plan of a real run, and the row numbers that arrived."""
        plans: list[Any] = []

        def plan(*args: Any) -> Any:
            plans.append(routes.plan(*args))
            return plans[-1]

        with mock.patch.object(exchange, "_Post", NotingPost), mock.patch.object(exchange, "plan", plan):
            ExpertExchange(dist.group.WORLD, waves=waves)(self.x, self.chosen, self.weights, *self.empty, 10.0)
        return plans[0], [note.clone() for note in NotingPost.notes]


def _waiting() -> float:
    """Seconds for which this thread was ready to run and another process had the processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def main() -> None:
    """Answer requests until the pipe closes."""
    torch.set_num_threads(1)
    print("{}", flush=True)
    layer: Layer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(seconds=120))
            layer = Layer(**request["build"])
            answer: dict[str, Any] = {"bytes": _traffic(layer)}
        else:
            assert layer is not None
            answer = layer.run(**request["run"])
        print(json.dumps(answer), flush=True)


def _traffic(layer: Layer) -> int:
    """Bytes of vectors that a step sends from this rank: rows and answers, there and back."""
    found, _ = routes.plan(layer.chosen, layer.full[0].shape[0], 1, dist.group.WORLD)
    rank = dist.get_rank()
    rows = sum(len(tokens) for r, tokens in enumerate(found.tokens) if r != rank)
    answers = len(found.layout) - (found.arrival[rank + 1] - found.arrival[rank])
    return 2 * (rows + answers) * layer.x.shape[1] * layer.x.element_size()


if __name__ == "__main__":
    main()
