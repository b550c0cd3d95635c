"""AdamW for embeddings, head, norms and biases: beta (0.9, 0.95), epsilon 1e-20, decoupled decay.

The arithmetic is `torch.optim.AdamW`; this file adds the two decay groups, state by parameter name, and the
same `step(lr)` as Muon. Source: V4 report, training setup.

With epsilon 1e-20 nothing floors the denominator: a row that receives a gradient of 1e-12 still moves by a
full step. That is intended for the embedding. Gates and biases of tiny models may drift, so their epsilon can
be set apart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rorqual.train.groups import Assigned, Owned, check_saved, clip

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """The optimizer for everything Muon does not take. `step(lr)` takes the learning rate."""

    def __init__(
        self,
        parameters: Sequence[Assigned],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        bias_eps: float | None = None,
        weight_decay: float = 0.1,
        owned: Owned | None = None,
    ) -> None:
        """`owned` limits the work to these places of the parameters; without it every element is updated."""
        self.parameters = list(parameters)
        self._pieces: list[tuple[Assigned, int, nn.Parameter]] = []  # (whose, first element, what torch's AdamW sees)
        for a in self.parameters:
            numel = a.parameter.numel()
            for start, stop in clip(0, numel, None if owned is None else owned.get(a.name, ())):
                is_whole = (start, stop) == (0, numel)
                view = a.parameter if is_whole else nn.Parameter(a.parameter.detach().view(-1)[start:stop])
                self._pieces.append((a, start, view))
        decayed = [piece for a, _, piece in self._pieces if a.role.kind != "bias"]
        biases = [piece for a, _, piece in self._pieces if a.role.kind == "bias"]
        groups = [
            {"params": decayed, "weight_decay": weight_decay, "eps": eps},
            {"params": biases, "weight_decay": 0.0, "eps": eps if bias_eps is None else bias_eps},
        ]
        kept = [group for group in groups if group["params"]]
        self._inner = torch.optim.AdamW(kept, lr=0.0, betas=betas, foreach=True) if kept else None

    @torch.no_grad()
    def step(self, lr: float, *, only: Callable[[str], bool] | None = None) -> None:
        """Apply one update; a parameter without a gradient counts as having a zero one.

        Parameters whose name `only` denies keep weights and moments; their steps are counted all the same, so that one
        number of steps goes for all.
        """
        if self._inner is None:
            return
        for group in self._inner.param_groups:
            group["lr"] = lr
        for assigned, start, piece in self._pieces:
            if only is not None and not only(assigned.name):
                piece.grad = None  # torch passes it over
                state = self._inner.state[piece]
                for key in MOMENTS:
                    state.setdefault(key, torch.zeros_like(piece))
                state["step"] = state.get("step", torch.zeros(())) + 1
                continue
            if assigned.parameter.grad is None:
                assigned.parameter.grad = torch.zeros_like(assigned.parameter)
            if piece is not assigned.parameter:
                piece.grad = assigned.parameter.grad.reshape(-1)[start : start + piece.numel()]
        self._inner.step()
        for assigned, _, piece in self._pieces:
            if piece is not assigned.parameter:
                piece.grad = None

    def state_ranges(self) -> Iterator[tuple[str, int, Tensor]]:
        """(`NAME#exp_avg` or `NAME#exp_avg_sq`, first element, values from there on, flat); nothing before a step."""
        for assigned, start, piece in self._pieces:
            inner = self._inner.state.get(piece) if self._inner else None
            if inner:
                for key in MOMENTS:
                    yield f"{assigned.name}#{key}", start, inner[key].detach().reshape(-1)

    @property
    def num_steps(self) -> Tensor | None:
        """Steps done, float32 [1] as torch counts them; None before the first (and without parameters)."""
        for _, _, piece in self._pieces:
            inner = self._inner.state.get(piece) if self._inner else None
            if inner:
                return inner["step"].detach().clone().reshape(1).cpu()
        return None

    @torch.no_grad()
    def load_ranges(self, read: Callable[[str, int, int], Tensor], num_steps: Tensor) -> None:
        """Take over moments; `read(key, start, stop)` gives elements of `NAME#MOMENT`, flat."""
        assert self._inner is not None or not self._pieces
        for assigned, start, piece in self._pieces:
            # `step` lies on the CPU in torch.optim unless it is fused.
            inner: dict[str, Tensor] = {"step": num_steps.detach().clone().reshape(()).cpu()}
            for key in MOMENTS:
                values = read(f"{assigned.name}#{key}", start, start + piece.numel())
                inner[key] = values.detach().clone().view(piece.shape).to(piece.device)
            assert self._inner is not None
            self._inner.state[piece] = inner

    def state_dict(self) -> dict[str, Tensor]:
        """Both moments as `NAME#exp_avg` and `NAME#exp_avg_sq`, and `#step`; empty before the first step.

        Zero where another rank's are.
        """
        state: dict[str, Tensor] = {}
        shapes = {a.name: a.parameter.shape for a in self.parameters}
        for key, start, values in self.state_ranges():
            if key not in state:
                state[key] = torch.zeros(shapes[key.rpartition("#")[0]], dtype=values.dtype, device=values.device)
            state[key].view(-1)[start : start + values.numel()].copy_(values)
        if self.num_steps is not None:
            state["#step"] = self.num_steps
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over moments saved by `state_dict`.

        Raises: CheckpointError when a parameter is missing or has another shape.
        """
        if self._inner is not None:
            self._inner.state.clear()
        if state:
            self.load_ranges(moments_in(state, self.parameters), state["#step"])


def moments_in(state: Mapping[str, Tensor], parameters: Sequence[Assigned]) -> Callable[[str, int, int], Tensor]:
    """What `load_ranges` reads from the `state_dict` of `AdamW` or `TableAdam`: elements of `NAME#MOMENT`, flat.

    Raises: CheckpointError when a parameter is missing or has another shape.
    """
    for assigned in parameters:
        for key in MOMENTS:
            check_saved("Moments", assigned, state.get(f"{assigned.name}#{key}"))
    return lambda key, start, stop: state[key].reshape(-1)[start:stop]
