"""New weights for a running engine, between two steps: no request is dropped, and each token's version is told.

Requests that run go on with the new weights. What they have read is read again with them, unless the caller says that
states stay: then later tokens attend to what older weights computed, which is cheaper, and which nobody can compute
again from the tokens alone. Source: training specification, sections 13.1 and 13.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.errors import CacheError, ConfigError, RequestError


@dataclass(frozen=True)
class Change:
    """Weights that wait for the end of a step. apply: changes them in place."""

    apply: Callable[[], None]
    version: int
    keep_states: bool
    done: Future[None] = field(default_factory=Future)


def check_version(version: int, present: int) -> None:
    """Raises: RequestError for a version that is none, or older than the present one."""
    if isinstance(version, bool) or not isinstance(version, int) or not present <= version < 1 << 32:
        raise RequestError(
            f"Invalid version value {version!r}: versions of weights are whole numbers below 2^32 that never fall, and "
            f"the engine has {present}.",
            param="version",
        )


def copying(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[], None]:
    """A function that copies `weights` (names as in `state_dict`) into the model, in its dtypes and devices.

    Weights that are not named stay. Raises: ConfigError for a name that the model has not or another shape; nothing has
    changed then.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    buffers = dict(model.named_buffers())
    for name, new in weights.items():
        try:
            old = buffers[name] if name in buffers else model.get_parameter(name)
        except AttributeError:
            raise ConfigError(
                f"the engine's model has no weight {name}, so this is another model's. Send the state_dict of a model "
                "with the same configuration."
            ) from None
        if old.shape != new.shape:
            raise ConfigError(
                f"{name} has shape {tuple(new.shape)}, and the engine's model has {tuple(old.shape)} there. Send the "
                "state_dict of a model with the same configuration."
            )
        pairs.append((old, new))

    def apply() -> None:
        with torch.inference_mode(False), torch.no_grad():
            for old, new in pairs:
                old.copy_(new)

    return apply


def restored(model: Any, saved: bytes, ids: Sequence[int]) -> Any:  # a Transformer and its State
    """The state of a suspended request, with the last of `ids` still to be read.

    Raises: CacheError when it has read something else, or is damaged or another model's.
    """
    state = model.restore(saved)
    held = state.tokens[0, : state.lengths[0]].tolist()
    if held != list(ids[: len(held)]):
        raise CacheError(
            f"The saved state has read {len(held)} tokens, and they are not the first of the {len(ids)} given. Give "
            "the prompt of the suspended request with all its tokens behind it."
        )
    if len(held) == len(ids):
        state.truncate(len(ids) - 1)
    return state
