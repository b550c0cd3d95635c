"""AdamW for embeddings, head, norms and biases: beta (0.9, 0.95), epsilon 1e-20, decoupled decay.

The arithmetic is `torch.optim.AdamW`; this file adds the two decay groups, state by parameter name, and the
same `step(lr)` as Muon. Source: V4 report, training setup.

With epsilon 1e-20 nothing floors the denominator: a row that receives a gradient of 1e-12 still moves by a
full step. That is intended for the embedding. Gates and biases of tiny models may drift, so their epsilon can
be set apart.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.train.groups import Assigned

_MOMENTS = ("exp_avg", "exp_avg_sq")


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
    ) -> None:
        self.parameters = list(parameters)
        decayed = [a.parameter for a in self.parameters if a.role.kind != "bias"]
        biases = [a.parameter for a in self.parameters if a.role.kind == "bias"]
        groups = [
            {"params": decayed, "weight_decay": weight_decay, "eps": eps},
            {"params": biases, "weight_decay": 0.0, "eps": eps if bias_eps is None else bias_eps},
        ]
        self._inner = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, foreach=True
        )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update; a parameter without a gradient counts as having a zero one."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        for assigned in self.parameters:
            if assigned.parameter.grad is None:
                assigned.parameter.grad = torch.zeros_like(assigned.parameter)
        self._inner.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Both moments as `NAME#exp_avg` and `NAME#exp_avg_sq`, and `#step`; empty before the first step."""
        state: dict[str, Tensor] = {}
        for assigned in self.parameters:
            inner = self._inner.state.get(assigned.parameter)
            if inner:
                state["#step"] = inner["step"].detach().clone().reshape(1)
                for key in _MOMENTS:
                    state[f"{assigned.name}#{key}"] = inner[key].detach().clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over moments saved by `state_dict`.

        Raises: CheckpointError when a parameter is missing or has another shape.
        """
        self._inner.state.clear()
        if not state:
            return
        for assigned in self.parameters:
            parameter = assigned.parameter
            # `step` lies on the CPU in torch.optim unless it is fused.
            inner: dict[str, Tensor] = {"step": state["#step"].detach().clone().reshape(()).cpu()}
            for key in _MOMENTS:
                saved = state.get(f"{assigned.name}#{key}")
                if saved is None or saved.shape != parameter.shape:
                    found = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                    raise CheckpointError(
                        f"The optimizer state holds {found} for {assigned.name} {tuple(parameter.shape)}. "
                        "Moments of another model cannot be used. Resume with the config that wrote the "
                        "checkpoint."
                    )
                inner[key] = saved.detach().clone().to(parameter.device)
            self._inner.state[parameter] = inner
