"""The products of this rank's experts, a run of experts at a time: what `ops.experts.grouped_experts` does between
sorting and adding up, with its choice of implementation and its arithmetic, so that both give the same bits.

Slots are sorted by expert; `bounds` say where each expert's slots begin and end. A slot reads the row `slot_row[slot]`.

M rows, N slots, D hidden, I expert width, L experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rorqual.ops import swiglu
from rorqual.ops.native import usable_typed
from rorqual.ops.native.library import call

Later = list[Callable[[], None]]
"""Work that may be done at any time before the results are read."""


class LocalExperts:
    """Buffers and products of one forward pass.

    Shapes: rows [M, D], slot_row int64 [N], gate fp32 [N], matrices w1 and w3 [L, I, D], w2 [L, D, I].

    `run` fills `out` [N, D], and `a`, `u` [N, I] for the backward pass. With `infers` there will be none, and the
    products are those of inference.
    """

    def __init__(
        self,
        rows: Tensor,
        slot_row: Tensor,
        gate: Tensor,
        bounds: list[int],
        matrices: tuple[Tensor, ...],
        limit: float,
        infers: bool = False,
    ) -> None:
        w1, w3, w2 = (w.to(rows.dtype).contiguous() for w in matrices)
        self.rows, self.slot_row, self.gate, self.limit = rows, slot_row, gate, limit
        self.w1, self.w3, self.w2 = w1, w3, w2
        self.bounds = bounds
        self.a, self.u = (rows.new_empty(len(gate), w1.shape[1]) for _ in range(2))
        self.out = rows.new_empty(len(gate), rows.shape[1])
        self.infers = infers
        self.is_native = infers or is_native(rows, w1)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the backward pass reads, for `save_for_backward`."""
        return self.rows, self.slot_row, self.gate, self.a, self.u, self.w1, self.w3, self.w2

    def run(self, first: int, last: int) -> None:
        """Experts `first` to `last` - 1: their part of `out`, `a` and `u`."""
        lo, hi = self.bounds[first], self.bounds[last]
        if self.infers:
            call(
                "experts_apply", self.rows, self.slot_row, self._bounds(first, last), self.gate, self.w1[first:last],
                self.w3[first:last], self.w2[first:last], last - first, *self._sizes(), self.limit, self.a, self.out,
            )  # fmt: skip
            return
        if self.is_native:
            call(
                "experts_forward", self.rows, self.slot_row, self._bounds(first, last), self.gate, self.w1[first:last],
                self.w3[first:last], self.w2[first:last], last - first, *self._sizes(), self.limit, self.a, self.u,
                self.out,
            )  # fmt: skip
            return
        xs = self.rows[self.slot_row[lo:hi]]
        for e, i, j in self._used(first, last):
            torch.mm(xs[i - lo : j - lo], self.w1[e].t(), out=self.a[i:j])
            torch.mm(xs[i - lo : j - lo], self.w3[e].t(), out=self.u[i:j])
        hidden = self._hidden(lo, hi)
        for e, i, j in self._used(first, last):
            torch.mm(hidden[i - lo : j - lo], self.w2[e].t(), out=self.out[i:j])

    def _hidden(self, lo: int, hi: int) -> Tensor:
        forward = swiglu.registry.pick("swiglu", self.a)
        return forward(self.a[lo:hi], self.u[lo:hi], self.gate[lo:hi], self.limit).to(self.rows.dtype)

    def _used(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Experts that any slot chose, with the bounds of their slots."""
        edges = self.bounds
        return [(e, edges[e], edges[e + 1]) for e in range(first, last) if edges[e] < edges[e + 1]]

    def _bounds(self, first: int, last: int) -> Tensor:
        return torch.tensor(self.bounds[first : last + 1])

    def _sizes(self) -> tuple[int, int]:
        return self.w1.shape[2], self.w1.shape[1]


class LocalGradients(LocalExperts):
    """The backward pass over saved `LocalExperts.tensors`; `dys` [M, D] are gradients of the slots' outputs, one for
    every row (a token's slots share theirs).

    Fills `dxs` [N, D], `dgate` fp32 [N] and the gradients `dw1`, `dw3`, `dw2`, which are sums in fp32.
    """

    def __init__(self, saved: tuple[Tensor, ...], bounds: list[int], limit: float, dys: Tensor) -> None:
        self.rows, self.slot_row, self.gate, self.a, self.u, self.w1, self.w3, self.w2 = saved
        self.bounds, self.limit, self.dys = bounds, limit, dys
        self.is_native = is_native(self.rows, self.w1)
        self.dxs, self.dgate = dys.new_empty(len(self.gate), dys.shape[1]), torch.empty_like(self.gate)
        kind = torch.float32 if self.is_native else self.rows.dtype
        self.dw1, self.dw3, self.dw2 = (torch.zeros_like(w, dtype=kind) for w in (self.w1, self.w3, self.w2))

    def run_back(self, first: int, last: int) -> Later:
        """Experts `first` to `last` - 1: their part of `dxs` and `dgate`; what is left to do for their weights."""
        lo, hi = self.bounds[first], self.bounds[last]
        if self.is_native:
            call(
                "experts_backward", self.rows, self.slot_row, self._bounds(first, last), self.gate, self.w1[first:last],
                self.w3[first:last], self.w2[first:last], self.a, self.u, self.dys, last - first, *self._sizes(),
                self.limit, self.dxs, self.dgate, self.dw1[first:last], self.dw3[first:last], self.dw2[first:last],
            )  # fmt: skip
            return []
        dys = self.dys[self.slot_row[lo:hi]]
        dhidden = torch.empty_like(self.a[lo:hi])
        for e, i, j in self._used(first, last):
            torch.mm(dys[i - lo : j - lo], self.w2[e], out=dhidden[i - lo : j - lo])
        backward = swiglu.registry.pick("swiglu_backward", self.a)
        da, du, dgate = backward(self.a[lo:hi], self.u[lo:hi], self.gate[lo:hi], dhidden, self.limit)
        da, du = da.to(self.rows.dtype), du.to(self.rows.dtype)
        self.dgate[lo:hi] = dgate
        for e, i, j in self._used(first, last):
            torch.mm(da[i - lo : j - lo], self.w1[e], out=self.dxs[i:j])
            self.dxs[i:j].addmm_(du[i - lo : j - lo], self.w3[e])

        def weights(e: int, i: int, j: int) -> None:
            xs = self.rows[self.slot_row[i:j]]
            torch.mm(dys[i - lo : j - lo].t(), self._hidden(i, j), out=self.dw2[e])
            torch.mm(da[i - lo : j - lo].t(), xs, out=self.dw1[e])
            torch.mm(du[i - lo : j - lo].t(), xs, out=self.dw3[e])

        # one product an expert over all its rows, whose order is fixed; only the moment is free
        return [partial(weights, *used) for used in self._used(first, last)]


def add_answers(answers: Tensor, place: Tensor, is_native: bool) -> Tensor:
    """Outputs of tokens from those of their slots, in ascending expert id whatever order the router listed them in.

    Shapes: answers [N, D] sorted by expert id, place int64 [T, A] -> fp32 [T, D].
    """
    slots = place.sort(-1).values
    return _combine(answers, slots) if is_native else _gather(answers, slots).float().sum(1)


def add_gradients(answers: Tensor, place: Tensor, is_native: bool) -> Tensor:
    """Gradients of tokens from those of their slots, in the order of `grouped_experts`.

    Shapes as above; the result has the dtype of x.
    """
    if is_native:
        return _combine(answers, place.sort(-1).values).to(answers.dtype)
    return _gather(answers, place).sum(1)


def _combine(answers: Tensor, slots: Tensor) -> Tensor:
    y = answers.new_empty(slots.shape[0], answers.shape[1], dtype=torch.float32)
    call("experts_combine", answers, slots.contiguous(), *slots.shape, answers.shape[1], y)
    return y


def _gather(answers: Tensor, slots: Tensor) -> Tensor:
    return answers[slots.flatten()].view(*slots.shape, answers.shape[1])


def is_native(rows: Tensor, w1: Tensor) -> bool:
    """Whether C computes it; the same choice as in `grouped_experts`."""
    return usable_typed(rows) and w1.shape[1] % 16 == 0 and w1.shape[2] % 16 == 0
