"""Expert parallelism: tokens travel to the ranks that hold their experts, and the answers travel back.

Source: V4 report, expert parallelism (experts in waves; the idea of DeepGEMM's MegaMoE). A call is

    plan        counts are exchanged, so that every rank knows what will arrive (`routes.py`)
    dispatch    token vectors, each once to every rank that needs it; routing weights and row numbers
    experts     each local expert once, over the tokens of all ranks
    combine     one answer for each (token, expert) pair, added on the token's home rank in ascending expert id

With several waves the local experts are worked through in groups: while one group computes, the rows of later groups
and the answers of earlier ones are on the wire. The backward pass sends gradients the same ways in reverse; the
gradients of the experts' weights, which nobody waits for, fill the time in which nothing else can run.

Every expert sees the same rows in the same order whatever the number of waves, so results do not depend on it. They
are those of one process that has all tokens (rank after rank) and all experts, to the last bit.

Left out: fused kernels (the transport is torch.distributed's point-to-point messages) and low-precision dispatch.

T tokens, D hidden, A active experts, I expert width, R ranks, L local experts, N slots served here.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from threading import Lock, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.ops.native import infers
from rorqual.parallel.local_experts import LocalExperts, LocalGradients, add_answers, add_gradients
from rorqual.parallel.routes import Routes, plan


class ExpertExchange:
    """Routed experts spread over the ranks of `group`, in place of `ops.experts.grouped_experts`.

    Every rank of the group must make the same calls in the same order, forward and backward, with any number of tokens
    (none included). `waves` is how many groups the local experts are worked through in; 1 does not overlap.
    """

    def __init__(self, group: dist.ProcessGroup, *, waves: int = 1) -> None:
        if waves < 1:
            raise ConfigError(f"The number of expert waves is {waves}; use 1 (no overlap) or more.")
        self.group, self.waves = group, waves

    def __call__(
        self,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        w1: Tensor,
        w3: Tensor,
        w2: Tensor,
        limit: float,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """sum_a expert_{experts[a]}(x, weights[a]) for this rank's tokens, plus what `meanwhile` returns.

        Shapes: x [T, D], experts int64 [T, A] (ids among all R * L), weights [T, A], w1 and w3 [L, I, D] and
        w2 [L, D, I] (this rank's share) -> fp32 [T, D]. `meanwhile` ([T, D]; the shared expert) runs while the first
        tokens travel. Differentiable in x, weights and the experts' weights; all ranks must agree on which of them
        need gradients. Raises: ConfigError for expert ids that no rank holds.
        """
        flight = _Flight(self.group, self.waves, w1.shape[0], limit, infers(x))
        ticket = _Dispatch.apply(x, weights, experts, flight)
        beside = None if meanwhile is None else meanwhile()
        y = _Combine.apply(ticket, w1, w3, w2, flight)
        return y if beside is None else y + beside.float()


class _Post:
    """Messages under way between this rank and the others of a group. Empty ones are not sent."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.peers = dist.get_process_group_ranks(group)
        # gloo matches messages by sender, so receives can wait from the beginning and a sender is never held up;
        # accelerators' backends work through them in the order given, so a receive must start together with its send
        self._is_early = dist.get_backend(group) == "gloo"
        self._sent: list[tuple[_Delivery, list[Tensor]]] = []

    def expect(self, pieces: list[Tensor]) -> "_Delivery":
        """Announce that `pieces[r]` (contiguous) will come from every other rank r, with this rank's matching `send`.

        Deliveries arrive in the order in which they are announced, and `send` must be called in that order too.
        """
        delivery = _Delivery(self._messages(dist.irecv, pieces))
        if self._is_early:
            delivery.start()
        return delivery

    def send(self, pieces: list[Tensor], delivery: "_Delivery") -> None:
        """Send `pieces[r]` to every other rank r (this rank's own piece is ignored)."""
        messages = self._messages(dist.isend, pieces)
        outgoing = _Delivery(messages) if self._is_early else delivery
        if outgoing is delivery:
            delivery.messages += messages
        outgoing.start()
        self._sent.append((outgoing, pieces))

    def _messages(self, function: Callable[..., Any], pieces: list[Tensor]) -> list[dist.P2POp]:
        return [
            dist.P2POp(function, piece, self.peers[r], self.group)
            for r, piece in enumerate(pieces)
            if r != self.rank and piece.numel()
        ]

    def close(self) -> None:
        """Wait until everything sent has left."""
        for outgoing, _ in self._sent:
            outgoing.wait()
        self._sent = []


class _Delivery:
    """Messages that are waited for together, once: gloo's point-to-point works hang at a second wait."""

    def __init__(self, messages: list[dist.P2POp]) -> None:
        self.messages, self.has_arrived = messages, False
        self._works: list[Any] = []
        self._lock = Lock()

    def start(self) -> None:
        """Begin to send or receive."""
        self._works = dist.batch_isend_irecv(self.messages) if self.messages else []

    def wait(self) -> None:
        """Return when all are here; on an accelerator, when its stream will find them here."""
        with self._lock:
            if not self.has_arrived:
                for work in self._works:
                    work.wait()
                self.has_arrived = True


class _Trip:
    """Rows from their homes to the experts, one answer a slot from the experts to the homes, in waves."""

    def __init__(self, routes: Routes, group: dist.ProcessGroup, x: Tensor) -> None:
        """Expect rows like those of `x` [T, D]."""
        self.routes, self.post = routes, _Post(group)
        self.rows = x.new_empty(routes.rows_received, x.shape[1])
        self.answers = x.new_empty(routes.place.numel(), x.shape[1])
        self._out = [self.post.expect([self.rows[lo:hi] for lo, hi in wave]) for wave in routes.received]
        self._back = [self.post.expect([self.answers[lo:hi] for lo, hi in wave]) for wave in routes.answered]

    def dispatch(self, x: Tensor) -> None:
        """Send this rank's rows of `x` [T, D], wave after wave."""
        for wave, delivery in enumerate(self._out):
            parts = [tokens[lo:hi] for tokens, (lo, hi) in zip(self.routes.tokens, self.routes.sent[wave], strict=True)]
            self.post.send(self._pieces(x, parts, self.rows, self.routes.received[wave]), delivery)

    def reply(self, wave: int, answers: Tensor) -> None:
        """Send a wave's answers, which stand among `answers` [N, D] in the order of computation."""
        parts = [self.routes.replies(wave, r) for r in range(len(self.post.peers))]
        self.post.send(self._pieces(answers, parts, self.answers, self.routes.answered[wave]), self._back[wave])

    def _pieces(self, source: Tensor, parts: list[Tensor], own: Tensor, ranges: list[tuple[int, int]]) -> list[Tensor]:
        """Rows of `source` for each rank; those for this rank itself go to their place in `own` at once."""
        lo, hi = ranges[self.post.rank]
        torch.index_select(source, 0, parts[self.post.rank], out=own[lo:hi])
        return [source[:0] if r == self.post.rank else source[part] for r, part in enumerate(parts)]

    def watch(self) -> None:
        """Let a thread wait for rows, so that `has_arrived` knows: gloo tells only those who wait."""
        if self.rows.device.type == "cpu":
            Thread(target=self._watch, name="rorqual-exchange", daemon=True).start()

    def _watch(self) -> None:
        with suppress(RuntimeError):  # a peer is gone; whoever needs the rows will hear it
            self.await_rows(len(self._out) - 1)

    def has_arrived(self, wave: int) -> bool:
        """Whether computing a wave needs no waiting. An accelerator's stream waits by itself; on CPUs see `watch`."""
        return self.rows.device.type != "cpu" or all(d.has_arrived for d in self._out[: wave + 1])

    def await_rows(self, wave: int) -> None:
        """Wait for the rows of a wave and of those before it."""
        for delivery in self._out[: wave + 1]:
            delivery.wait()

    def await_answers(self) -> Tensor:
        """All answers to this rank's slots [T * A, D], sorted by expert id, then token."""
        for delivery in self._back:
            delivery.wait()
        self.post.close()
        return self.answers


class _Flight:
    """What the two halves of one call share."""

    routes: Routes
    trip: _Trip
    """The forward trip, from dispatch to combine."""
    notes: Tensor
    """int32 [N, 2] in the order of arrival: each slot's row among those from its home rank, routing weight's bits."""
    notes_come: "tuple[_Post, _Delivery]"
    is_native: bool
    returning: "tuple[_Trip, _Post, _Delivery, Tensor]"
    """The backward trip, and the gradients of the routing weights [T * A], sorted as the answers are."""

    def __init__(self, group: dist.ProcessGroup, waves: int, experts_here: int, limit: float, infers: bool) -> None:
        self.group, self.waves, self.experts_here, self.limit = group, waves, experts_here, limit
        self.infers = infers

    def gates_and_rows(self) -> tuple[Tensor, Tensor]:
        """Routing weight and row of each slot [N], in the order of computation."""
        post, delivery = self.notes_come
        delivery.wait()
        post.close()
        r = self.routes
        first = [r.received[0][rank][0] for rank in range(len(post.peers))]
        row = self.notes[:, 0].long()
        for rank, start in enumerate(first):
            row[r.arrival[rank] : r.arrival[rank + 1]] += start
        return self.notes[:, 1].contiguous().view(torch.float32)[r.layout], row[r.layout]


class _Dispatch(torch.autograd.Function):
    """Sends tokens off; backward takes their gradients home."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, ctx.weights_dtype = flight, weights.dtype
        flight.routes, numbers = plan(experts, flight.experts_here, flight.waves, flight.group)
        r, post = flight.routes, _Post(flight.group)
        flight.notes = numbers[0].new_empty(len(r.layout), 2)
        delivery = post.expect([flight.notes[lo:hi] for lo, hi in pairwise(r.arrival)])
        flight.notes_come = post, delivery
        sorted_weights = torch.empty(r.place.numel(), dtype=torch.float32, device=x.device)
        sorted_weights[r.place.flatten()] = weights.float().flatten()
        parts = sorted_weights.split([len(n) for n in numbers])
        pieces = [torch.stack([n, w.view(torch.int32)], 1) for n, w in zip(numbers, parts, strict=True)]
        post.send(pieces, delivery)
        flight.notes[r.arrival[post.rank] : r.arrival[post.rank + 1]] = pieces[post.rank]
        flight.trip = _Trip(r, flight.group, x)
        flight.trip.dispatch(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        trip, post, delivery, dgates = ctx.flight.returning
        del ctx.flight.returning
        place = trip.routes.place
        dx = add_gradients(trip.await_answers(), place, ctx.flight.is_native)
        delivery.wait()
        post.close()
        return dx, dgates[place].to(ctx.weights_dtype), None, None


class _Combine(torch.autograd.Function):
    """Runs this rank's experts wave by wave and adds up what all ranks' experts answer."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, flight: _Flight) -> Tensor:
        r, trip = flight.routes, flight.trip
        del flight.trip
        gate, slot_row = flight.gates_and_rows()
        del flight.notes, flight.notes_come
        local = LocalExperts(trip.rows, slot_row, gate, r.expert_bounds, (w1, w3, w2), flight.limit, flight.infers)
        for wave, experts in enumerate(r.waves):
            trip.await_rows(wave)
            local.run(*experts)
            trip.reply(wave, local.out)
        ctx.flight, ctx.dtypes = flight, (w1.dtype, w3.dtype, w2.dtype)
        ctx.save_for_backward(*local.tensors())
        flight.is_native = local.is_native
        return add_answers(trip.await_answers(), r.place, local.is_native)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flight: _Flight = ctx.flight
        saved = ctx.saved_tensors
        r, dy = flight.routes, grads[0].to(saved[0].dtype)
        trip, post = _Trip(r, flight.group, dy), _Post(flight.group)
        local = LocalGradients(saved, r.expert_bounds, flight.limit, trip.rows)
        dgates = local.dgate.new_empty(r.place.numel())
        own = slice(r.answered[0][post.rank][0], r.answered[-1][post.rank][1])
        ends = zip(r.answered[0], r.answered[-1], strict=True)
        delivery = post.expect([dgates[first[0] : last[1]] for first, last in ends])
        trip.dispatch(dy)
        if len(r.waves) > 1:
            trip.watch()
        later: deque[Callable[[], None]] = deque()
        for wave, experts in enumerate(r.waves):
            while later and not trip.has_arrived(wave):
                later.popleft()()
            trip.await_rows(wave)
            later.extend(local.run_back(*experts))
            trip.reply(wave, local.dxs)
        arrived = local.dgate[r.arrived]
        pieces = [arrived[lo:hi] for lo, hi in pairwise(r.arrival)]
        post.send(pieces, delivery)
        dgates[own] = pieces[post.rank]
        while later:
            later.popleft()()
        if ctx.needs_input_grad[0]:
            flight.returning = trip, post, delivery, dgates
        else:  # nobody will ask for them, but the messages must end
            trip.await_answers()
            delivery.wait()
            post.close()
        weights = (local.dw1, local.dw3, local.dw2)
        return dy.new_empty(0), *(dw.to(kind) for dw, kind in zip(weights, ctx.dtypes, strict=True)), None
