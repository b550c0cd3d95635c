"""Muon as V4 uses it: momentum, then the nearest isometry of the look-ahead gradient, scaled to an
AdamW-sized step.

For every matrix W [n, m] with gradient G and momentum M (zero at first):

    M <- mu M + G
    O <- newton_schulz(mu M + G) * sqrt(max(n, m)) * gamma
    W <- W (1 - lr decay) - lr O

An isometry has root-mean-square 1 / sqrt(max(n, m)), so every update has rms gamma = 0.18, about what AdamW
makes, and AdamW's learning rates and decay carry over. Source: V4 report, Algorithm 1.

Matrices of one shape share one momentum tensor [B, n, m] whatever layer they come from, so Newton–Schulz runs
as a few batched products instead of hundreds of small ones. Saved state is by parameter name and does not
depend on batching.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.ops.newton_schulz import HYBRID, Coefficients, newton_schulz
from rorqual.train.groups import Assigned, Owned, check_saved, clip, matrices

CHUNK_BYTES = 1 << 20
"""Newton–Schulz on a CPU takes this many bytes of matrices at a time, so that the iteration stays in a core's
cache.
"""


@dataclass(frozen=True)
class _Piece:
    """Matrices of one shape that lie side by side in one parameter."""

    assigned: Assigned
    start: int
    """First element, in the flattened parameter."""
    weight: Tensor
    """View of the parameter, [b, n, m]."""

    @property
    def stop(self) -> int:
        return self.start + self.weight.numel()

    def gradient(self) -> Tensor:
        """[b, n, m] in float32; a parameter without one counts as zero."""
        gradient = self.assigned.parameter.grad
        if gradient is None:
            return torch.zeros_like(self.weight, dtype=torch.float32)
        return gradient.reshape(-1)[self.start : self.stop].view(self.weight.shape).float()


class _Bucket:
    """All matrices of one shape: views of their parameters and one stacked momentum [B, n, m]."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self.pieces = pieces
        first = pieces[0].weight
        self.sizes = [piece.weight.shape[0] for piece in pieces]
        self.momentum = torch.zeros(sum(self.sizes), *first.shape[1:], dtype=torch.float32, device=first.device)

    def momenta(self) -> list[tuple[_Piece, Tensor]]:
        """Each piece with its part of the momentum, [b, n, m]."""
        return list(zip(self.pieces, self.momentum.split(self.sizes), strict=True))


class Muon:
    """The optimizer for matrices. `step(lr)` takes the learning rate; schedules live in `schedules.py`."""

    def __init__(
        self,
        parameters: Sequence[Assigned],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        nesterov: bool = True,
        steps: tuple[Coefficients, ...] = HYBRID,
        compute_dtype: torch.dtype | None = None,
        owned: Owned | None = None,
    ) -> None:
        """`owned` limits the work to whole matrices at these places; without it every matrix is updated."""
        self.parameters = list(parameters)
        self.mu = momentum
        self.weight_decay = weight_decay
        self.update_rms = update_rms
        self.nesterov = nesterov
        self.steps = steps
        self.compute_dtype = compute_dtype
        grouped: dict[tuple[object, ...], list[_Piece]] = {}
        for assigned in self.parameters:
            flat = assigned.parameter.detach().view(-1)
            ranges = None if owned is None else owned.get(assigned.name, ())
            for first, count, n, m in matrices(tuple(assigned.parameter.shape), assigned.role):
                for start, stop in clip(first, first + count * n * m, ranges):
                    assert not (start - first) % (n * m) and not (stop - start) % (n * m), "a matrix has one owner"
                    piece = _Piece(assigned, start, flat[start:stop].view(-1, n, m))
                    grouped.setdefault((n, m, flat.device, flat.dtype), []).append(piece)
        self._buckets = [_Bucket(pieces) for pieces in grouped.values()]

    @torch.no_grad()
    def step(
        self, lr: float, *, only: Callable[[str], bool] | None = None, measure: bool = False
    ) -> tuple[float, float]:
        """Apply one update from the gradients now on the parameters; decay is scaled by `lr` too.

        Parameters whose name `only` denies keep weights and momentum. With `measure` returns the sum of squares of the
        updates at learning rate 1 and the number of their elements, otherwise zeros.
        """
        squares, count = [], 0
        for bucket in self._buckets:
            moving = [(p, m) for p, m in bucket.momenta() if only is None or only(p.assigned.name)]
            if not moving:
                continue
            pieces = [piece for piece, _ in moving]
            is_whole = len(pieces) == len(bucket.pieces)
            momentum = bucket.momentum if is_whole else torch.cat([part for _, part in moving])
            gradients = torch.cat([piece.gradient() for piece in pieces])
            momentum.mul_(self.mu).add_(gradients)
            if not is_whole:
                for (_, part), new in zip(moving, momentum.split([part.shape[0] for _, part in moving]), strict=True):
                    part.copy_(new)
            direction = gradients.add_(momentum, alpha=self.mu) if self.nesterov else momentum
            updates = self._orthogonalise(direction)
            n, m = updates.shape[-2:]
            factor = self.update_rms * math.sqrt(max(n, m))
            for piece, update in zip(pieces, updates.split([piece.weight.shape[0] for piece in pieces]), strict=True):
                piece.weight.mul_(1.0 - lr * self.weight_decay).add_(update, alpha=-lr * factor)
            if measure:
                squares.append(updates.float().square().sum() * factor**2)
                count += updates.numel()
        return (float(torch.stack(squares).sum()) if squares else 0.0), float(count)

    def _orthogonalise(self, matrices: Tensor) -> Tensor:
        if not matrices.is_cpu:
            return newton_schulz(matrices, self.steps, dtype=self.compute_dtype)
        per_chunk = max(1, CHUNK_BYTES // (4 * matrices.shape[1] * matrices.shape[2]))
        chunks = [newton_schulz(c, self.steps, dtype=self.compute_dtype) for c in matrices.split(per_chunk)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def state_ranges(self) -> Iterator[tuple[str, int, Tensor]]:
        """(parameter name, first element, momentum from there on, flat): views of what this instance works on."""
        for bucket in self._buckets:
            for piece, momentum in bucket.momenta():
                yield piece.assigned.name, piece.start, momentum.reshape(-1)

    @torch.no_grad()
    def load_ranges(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Take over momentum; `read(name, start, stop)` gives elements of a parameter's, flat."""
        for bucket in self._buckets:
            for piece, momentum in bucket.momenta():
                momentum.copy_(read(piece.assigned.name, piece.start, piece.stop).view(momentum.shape))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Momentum by parameter name, each in its parameter's shape (float32 copies); zero where another rank's is."""
        state = {a.name: torch.zeros(a.parameter.shape, dtype=torch.float32) for a in self.parameters}
        for name, start, momentum in self.state_ranges():
            state[name].view(-1)[start : start + momentum.numel()].copy_(momentum)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over momentum saved by `state_dict`.

        Raises: CheckpointError when a parameter is missing or has another shape.
        """
        for assigned in self.parameters:
            check_saved("Momentum", assigned, state.get(assigned.name))
        self.load_ranges(lambda name, start, stop: state[name].reshape(-1)[start:stop])
