"""What the session needs of a model: the rest of a turn, as token ids, given all ids before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rorqual.tokenizer import Tokenizer

Resumption = Literal["exact", "restart"]
"""`exact`: a turn goes on at the token where it broke off. `restart`: the server can only begin the turn again."""


@dataclass(frozen=True)
class Identity:
    """What decides a model's tokens, for the record. fingerprint: of the weights and arithmetic, where known."""

    model: str
    fingerprint: str
    tokenizer: str
    policy_version: int = 0


@dataclass(frozen=True)
class Turn:
    """A turn to be written, or written on.

    ids: everything before the next token: prompt, earlier turns, results, and what is logged of this turn.
    begun: how many of them belong to this turn. index: the turn's number, from 0. seed: of the trajectory's draws; the
    draw for a token depends on it and on the token's position alone. max_tokens: most that may still come.
    messages: the same conversation for servers that take messages; without this turn.
    should_stop: asked between tokens; True ends the generation early.
    """

    ids: Sequence[int]
    begun: int
    index: int
    seed: int
    max_tokens: int
    messages: Sequence[Mapping[str, Any]] = ()
    should_stop: Callable[[], bool] = field(default=lambda: False)


@dataclass(frozen=True)
class Batch:
    """Tokens that came together. finish: why the turn ends here, where it does not by its end token.

    usage: the server's own counts of the whole turn, where it told them: prompt, cached and completion tokens.
    """

    ids: Sequence[int]
    logprobs: Sequence[float] | None = None
    finish: str | None = None
    usage: tuple[int, int, int] | None = None


class Backend(Protocol):
    """A model behind the session."""

    @property
    def identity(self) -> Identity: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def thinking(self) -> bool: ...
    @property
    def resumption(self) -> Resumption: ...
    def generate(self, turn: Turn) -> Iterator[Batch]:
        """The turn's next tokens until it ends. Raises: RequestError when the model refuses or fails."""
        ...

    def close(self) -> None: ...
