"""The record of a rollout: token ids, never text, so what was sampled is what is scored and trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rorqual.errors import RequestError


@dataclass
class Trajectory:
    """Ids of a whole episode, and for each whether the model wrote it.

    ids: prompt, answers and tool results in order.
    logprobs: log probability under the policy that sampled it; 0.0 where `mask` is False.
    mask: True for tokens the model chose (these are trained on), False for those it was given.
    policy_version: the version of the weights that sampled the latest answer.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    policy_version: int = 0

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.logprobs) == len(self.mask):
            raise RequestError(
                f"a trajectory needs one logprob and one mask value per id, but got {len(self.ids)} ids, "
                f"{len(self.logprobs)} logprobs and {len(self.mask)} mask values. Make them equally long."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def add_given(self, ids: Sequence[int]) -> None:
        """Append tokens the model did not choose: a prompt, a tool result, the next turn's header."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [False] * len(ids)

    def add_chosen(self, ids: Sequence[int], logprobs: Sequence[float], policy_version: int | None = None) -> None:
        """Append tokens the model sampled. Raises: RequestError unless there is one logprob per id."""
        if len(ids) != len(logprobs):
            raise RequestError(
                f"{len(ids)} sampled ids came with {len(logprobs)} logprobs, but each needs its own. "
                "Ask the engine for them with SamplingParams(logprobs=True).",
                param="logprobs",
            )
        self.ids += ids
        self.logprobs += logprobs
        self.mask += [True] * len(ids)
        if policy_version is not None:
            self.policy_version = policy_version
