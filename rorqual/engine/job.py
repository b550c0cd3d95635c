"""A request together with what the engine keeps for it while it waits and runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.engine.grammar import Constraint
from rorqual.engine.request import Request
from rorqual.engine.stops import StopFilter


@dataclass(eq=False)
class Job:
    """One request's work: `num_tokens` tokens are known (prompt and sampled), of which the state has read `num_read`.

    A job that lost its state (preemption, a failed step) starts again from `num_read` 0: it reads its sampled tokens
    after its prompt, and the next token it samples is the one it would have sampled.
    """

    request: Request
    decoder: Any  # the tokenizer's stream decoder: push(id) -> str, flush() -> str
    stops: StopFilter
    order: int = 0  # of arrival, given by the scheduler
    state: Any = None  # the model's State; made at the first step, owned by this job alone
    guard: Any = None  # shows its queries more than the indexer picks; the state has one made like it
    lease: Any = None  # what the prefix cache knows of the state, where there is a cache
    num_read: int = 0
    ids: list[int] = field(default_factory=list)  # sampled so far
    constraint: Constraint | None = None  # told of every sampled token; a job that starts again keeps it as it is
    drafts: tuple[int, ...] = ()  # tokens that the next step reads besides, to be verified
    drafting: Any = None  # what speculation keeps for this job, where it is on
    may_draft: bool = True  # until a step with drafts failed
    experts: list[NDArray[np.int16]] = field(default_factory=list)  # of tokens read since the last event, [n, L, A]
    num_routed: int = 0  # tokens whose experts were kept; what is read again is not kept again
    alone_until: int = 0  # a step with others failed: no company until this many tokens are read

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: smaller is earlier. Higher priority, then earlier arrival."""
        return -self.request.priority, self.order

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.request.prompt_ids) + len(self.ids)

    @property
    def most_tokens(self) -> int:
        """Tokens this job can ever hold."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether it still reads what is known, rather than the token it sampled last."""
        return not self.ids or self.num_read < self.num_tokens - 1

    def known(self, begin: int, end: int) -> tuple[int, ...]:
        """The known tokens from position `begin` to before `end`."""
        prompt = self.request.prompt_ids
        return prompt[begin:end] + tuple(self.ids[max(0, begin - len(prompt)) : max(0, end - len(prompt))])

    def next_ids(self, count: int) -> tuple[int, ...]:
        """The next `count` known tokens after those read."""
        return self.known(self.num_read, self.num_read + count)

    def keep_experts(self, experts_TLA: NDArray[np.int16]) -> None:
        """The experts of the tokens from `num_read` on, which are about to count as read."""
        new = experts_TLA[max(0, self.num_routed - self.num_read) :]
        if len(new):
            self.experts.append(new)
            self.num_routed += len(new)

    def take_experts(self) -> NDArray[np.int16] | None:
        """What was kept since this was last asked."""
        if not self.experts:
            return None
        out, self.experts = np.concatenate(self.experts), []
        return out

    def settle(self) -> None:
        """Take back the drafts of the last step that did not become tokens: the state has read all but the last one."""
        if not self.drafts:
            return
        self.drafts, self.num_read = (), self.num_tokens - 1
        self.state.truncate(self.num_read)
        if self.drafting is not None and self.drafting.memory is not None:
            self.drafting.memory.truncate(self.num_read)

    def forget(self) -> None:
        """Drop the state; everything known will be read again."""
        self.state, self.lease, self.num_read = None, None, 0
        self.drafts, self.drafting = (), None
