"""An engine in this process: token ids in, token ids out, and a broken turn goes on as if nothing had happened.

The draw for a token is a function of the trajectory's seed and of the token's position in the whole sequence
(`engine/sampler.py`), so giving the engine the logged ids as its prompt continues the very same answer.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rorqual.agents.models.base import Batch, Identity, Resumption, Turn
from rorqual.chat import suppressed_ids
from rorqual.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rorqual.engine import Engine, Request, SamplingParams, TokenEvent

POLL_S = 0.2
"""How often the wait for a token looks whether the run was asked to stop."""


class EngineBackend:
    """Turns from an `Engine`. params: temperature and filters; seed, length and suppressed ids are set for each turn.

    policy_version: of the weights; give a new number when they changed within a run. on_close: called when
    the engine was closed.
    """

    resumption: Resumption = "exact"

    def __init__(
        self,
        engine: Engine,
        name: str,
        params: SamplingParams | None = None,
        *,
        thinking: bool = True,
        policy_version: int = 0,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        from rorqual.engine import SamplingParams

        self._engine, self.thinking, self._on_close = engine, thinking, on_close
        self.tokenizer: Tokenizer = engine.tokenizer  # type: ignore[assignment]  # the protocol asks for less
        suppressed = suppressed_ids(self.tokenizer, thinking=thinking, tools=True)
        self._params = (params or SamplingParams()).replace(suppress_token_ids=suppressed, logprobs=True)
        self.identity = Identity(name, fingerprint(engine, self._params), self.tokenizer.fingerprint, policy_version)

    def generate(self, turn: Turn) -> Iterator[Batch]:
        """Raises: RequestError as `Engine.submit`, or when the request failed."""
        inbox: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        params = self._params.replace(seed=turn.seed, max_tokens=turn.max_tokens)
        request = self._engine.submit(tuple(turn.ids), params, listener=inbox.put)
        try:
            yield from self._batches(request, inbox, turn)
        finally:
            request.cancel()

    def _batches(self, request: Request, inbox: queue.SimpleQueue[TokenEvent], turn: Turn) -> Iterator[Batch]:
        while True:
            if turn.should_stop():
                return
            try:
                events = [inbox.get(timeout=POLL_S)]
            except queue.Empty:
                continue
            while not inbox.empty():  # what came while the last batch was made durable
                events.append(inbox.get())
            last = events[-1].finish_reason
            if last == "error":
                assert request.error is not None
                raise request.error
            tokens = [event for event in events if event.id is not None]
            usage = None
            if last is not None:
                counts = request.usage
                usage = counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens
            yield Batch(
                [event.id for event in tokens if event.id is not None],
                [event.logprob or 0.0 for event in tokens],
                finish=None if last in (None, "stop") else last,
                usage=usage,
            )
            if last is not None:
                return

    def close(self) -> None:
        """Close the engine, and what it was opened with."""
        self._engine.close()
        self._on_close()


def fingerprint(engine: Engine, params: SamplingParams) -> str:
    """What decides the engine's tokens besides prompt and seed: weights, arithmetic, and how it samples."""
    import hashlib

    from rorqual.engine.store.fingerprint import store_fingerprint

    try:
        weights = store_fingerprint(engine.model).hex()  # type: ignore[arg-type]  # a Transformer, or see below
    except AttributeError:  # another kind of model, such as a test's
        weights = type(engine.model).__name__
    how = f"{params.temperature} {params.top_p} {params.top_k} {params.min_p}"
    return f"engine {weights} {hashlib.sha256(how.encode()).hexdigest()[:8]}"
