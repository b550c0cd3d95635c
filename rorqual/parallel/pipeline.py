"""Pipeline parallelism: micro-batches pass through stages of layers, by torch.distributed.pipelining's schedules.

What crosses a border are the residual streams [B, S, N, D], and their gradients on the way back. Token ids, document
borders and labels are known on every rank, so a stage takes them from the batch by the micro-batch's number. Losses of
inner stages (router balance, indexers) ride on the streams (`carry` in `train/losses.py`). 1F1B is used where there are
at least as many micro-batches as stages, GPipe below.
Source: V4 report, pipeline parallelism. Left out: DualPipe's overlap.

B batch, S tokens, N streams, D hidden.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from rorqual.model import Transformer
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.stages import copies

Compute = Callable[[int, Tensor | None], Tensor]
"""Micro-batch number and the streams from the stage before (None on the first) -> streams to pass on, or the loss."""


class _Stage(nn.Module):
    """What torch's schedule calls: positional arguments are a micro-batch number, or the streams received."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.compute: Compute | None = None

    def forward(self, given: Tensor, number: Tensor | None = None) -> Tensor:
        assert self.compute is not None
        if number is None:
            return self.compute(int(given), None)
        out = self.compute(int(number), given)
        return torch.stack([out]) if self.model.is_last else out


class Pipeline:
    """This rank's stage of a model that `cut_model` has cut."""

    def __init__(self, model: Transformer, mesh: Mesh, device: torch.device) -> None:
        assert mesh.pp_group is not None
        self.model, self.mesh, self.group, self.device = model, mesh, mesh.pp_group, device
        self._stage = _Stage(model)
        self._schedules: dict[tuple[int, tuple[int, ...], torch.dtype], ScheduleGPipe | Schedule1F1B] = {}

    def forward_backward(self, count: int, tokens: Tensor, compute: Compute) -> None:
        """Run micro-batches 0 to `count` - 1 through all stages and back; gradients add up on the parameters.

        All have the shape of `tokens`, whole rows of ids [B, S]. All ranks of the pipeline must call it alike.
        """
        key = count, *self._streams(tokens)
        if key not in self._schedules:
            self._schedules = {key: self._schedule(*key)}  # earlier shapes' buffers are let go
        numbers = torch.arange(count)
        self._stage.compute = compute
        try:
            if self.model.is_first:
                self._schedules[key].step(numbers)
            else:
                self._schedules[key].step(target=numbers, number=numbers)
        finally:
            self._stage.compute = None
        self._sum_copies()

    def _schedule(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> ScheduleGPipe | Schedule1F1B:
        streams = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        stage = PipelineStage(
            self._stage,
            self.mesh.pp_rank,
            self.mesh.pp,
            self.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if self.model.is_first else streams,
            output_args=torch.empty(1, device="meta", requires_grad=True) if self.model.is_last else streams,
            group=self.group,
        )
        kind = Schedule1F1B if count >= self.mesh.pp else ScheduleGPipe
        return kind(stage, count, loss_fn=lambda loss, _: loss, scale_grads=False)

    @torch.no_grad()
    def _sum_copies(self) -> None:
        """Gradients of parameters that two stages hold become the sum of both, first stage's first, on both."""
        names = {"embed.weight"} if self.mesh.pp_rank == 0 and self.model.cfg.mtp_layers else copies(self.model)
        for name in sorted(names):
            parameter = self.model.get_parameter(name)
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            other = torch.empty_like(own)
            peer = dist.get_global_rank(self.group, self.mesh.pp - 1 if self.model.is_first else 0)
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, own, peer, self.group), dist.P2POp(dist.irecv, other, peer, self.group)]
            ):
                work.wait()
            first, last = (own, other) if self.model.is_first else (other, own)
            parameter.grad = first + last

    def _streams(self, tokens: Tensor, *, is_whole: bool = True) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what crosses a border for ids [B, S]: of whole rows, or (not `is_whole`) just these."""
        own = self.model.own(tokens) if is_whole else tokens
        return (*own.shape, self.model.cfg.hc_mult, self.model.cfg.hidden_size), self.model.streams_dtype

    @torch.no_grad()
    def relay(self, tokens: Tensor, compute: Compute, *, is_whole: bool = True) -> Tensor:
        """Forward one batch without gradients; what the last stage computes comes back on every rank, in fp32.

        `tokens` [B, S] gives the shape: whole rows, or without `is_whole` what every stage computes (with a state).
        """
        source, target = self.mesh.pp_rank - 1, self.mesh.pp_rank + 1
        shape, dtype = self._streams(tokens, is_whole=is_whole)
        streams = None
        if not self.model.is_first:
            streams = torch.empty(shape, dtype=dtype, device=self.device)
            dist.recv(streams, dist.get_global_rank(self.group, source), group=self.group)
        out = compute(0, streams)
        if not self.model.is_last:
            dist.send(out.contiguous(), dist.get_global_rank(self.group, target), group=self.group)
        return self._from_last(out if self.model.is_last else None)

    def _from_last(self, value: Tensor | None) -> Tensor:
        """A tensor of the last stage on all stages, whatever its shape."""
        last = dist.get_global_rank(self.group, self.mesh.pp - 1)
        header = torch.zeros(9, dtype=torch.int64, device=self.device)
        if value is not None:
            value = value.contiguous()
            header[: value.ndim + 1] = torch.tensor([value.ndim, *value.shape])
        dist.broadcast(header, last, group=self.group)
        ndim, *sizes = header.tolist()
        if value is None:
            value = torch.empty(sizes[:ndim], dtype=torch.float32, device=self.device)
        value = value.float()
        dist.broadcast(value, last, group=self.group)
        return value
