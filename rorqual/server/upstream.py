"""An engine elsewhere: requests are rendered, encoded and parsed here, and only token ids go to another server.

What goes over is `/v1/completions` with the prompt as token ids, so the upstream's own chat template and parsers are
not asked: prompts are exact, text of users cannot become control tokens, and what this server does around an engine
(dialects, continuity of reasoning, accounts, aliases) works the same in front of one. `RemoteEngine` has the methods of
`rorqual.engine.Engine` that the server calls.

Left out, because an upstream's answer has text and no token ids: log probabilities, grammars (forced calls, strict
tools, JSON), suppressed tokens, picks. The first two are refused by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2

from rorqual import log
from rorqual.engine import EngineStats, Grammar, Request, SamplingParams, StepRecord, TokenEvent, Usage
from rorqual.engine.checks import as_array, check_priority, check_request, check_timeout
from rorqual.engine.events import FinishReason
from rorqual.engine.failures import closed
from rorqual.engine.request import Listener
from rorqual.engine.scheduler import Scheduler
from rorqual.engine.watch import RequestView
from rorqual.errors import RequestError
from rorqual.server.upstream_wire import Broken, Delta, Dialect, Link, request_body, unreachable
from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.special import EOS

logger = log.get(__name__)

POLL_S = 10.0
"""How often an upstream that nobody asks is looked at, for `/health`."""


class RemoteRequest(Request):
    """A request that runs elsewhere. `taken`: done once the upstream has taken it, or failed with its refusal."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int], params: SamplingParams, **more: Any) -> None:
        super().__init__(tokens, params, **more)
        self.taken: Future[None] = Future()
        self._tokenizer = tokenizer
        self._told: tuple[int, int] | None = None

    def tell_usage(self, completion_tokens: int, cached_tokens: int) -> None:
        """The upstream's own count of what it sampled and what its cache had."""
        self._told = completion_tokens, cached_tokens

    @property
    def usage(self) -> Usage:
        """The upstream's count; before it has told one, the tokens of the text so far."""
        if self._told is None:
            text = "".join(event.text for event in self.events)
            return Usage(len(self.prompt_ids), len(self._tokenizer.encode(text)) if text else 0)
        return Usage(len(self.prompt_ids), *self._told)

    def fail(self, error: RequestError) -> None:
        """End with an error, which is also how it was refused if it had not been accepted."""
        if not self.taken.done():
            self.taken.set_exception(error)
        super().fail(error)


class _NoGrammars:
    def constraint(self, grammar: Grammar) -> None:
        """Raises: RequestError: what is sampled elsewhere cannot be held to a grammar from here."""
        raise RequestError(
            f"{grammar.param} asks for an answer of a given form, but the model runs on another server, whose sampling "
            "this one cannot hold to it. Leave it out (or send `auto`), and check the answer.",
            param=grammar.param,
        )


class RemoteEngine:
    """The server's side of a model that runs on another server. Use as a context manager or call `close()`.

    config: of the model (`vocab_size`). context_limit: most tokens of prompt and output. max_running: requests at a
    time; one more is refused (429).
    """

    prefix_cache = None
    speculation = None

    def __init__(
        self, link: Link, tokenizer: Tokenizer, config: Any, *, context_limit: int, max_running: int = 256
    ) -> None:
        self.link, self.tokenizer = link, tokenizer
        self.model = SimpleNamespace(cfg=config)
        self.context_limit, self.max_running = context_limit, max_running
        self.grammars = _NoGrammars()
        self._limits = Scheduler(max_running, max_running, 512, None)  # an engine's checks ask it what fits: anything
        self._num_choices = min(int(config.vocab_size), tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._active: dict[RemoteRequest, asyncio.Task[None] | None] = {}
        self._finished: Counter[FinishReason] = Counter()
        self._prompt_tokens = self._sampled_tokens = 0
        self._closing, self._reachable, self._heard = False, True, time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rorqual-upstream", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- as an engine

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        listener: Listener | None = None,
        rendered: bool = False,
        cache_scope: str = "",
    ) -> RemoteRequest:
        """As `Engine.submit`; `priority` orders nothing elsewhere. Raises: RequestError."""
        params = params or SamplingParams()
        if params.logprobs or params.prompt_logprobs:
            raise RequestError(
                "logprobs need token ids, and the server that runs this model tells text only. Leave logprobs out.",
                param="logprobs",
            )
        if params.guard not in (None, "off") or params.pin:
            raise RequestError(
                "A retrieval guard works inside the engine that runs a model, and this one runs on another server. "
                "Leave guard out.",
                param="guard",
            )
        tokens = tuple(tokens)
        ids = as_array(tokens)
        checked = tokens if ids is None else ids
        max_tokens = check_request(checked, params, self._num_choices, self.context_limit, self._limits)
        check_timeout(timeout_s)
        check_priority(priority)
        seed = params.seed if params.seed is not None else secrets.randbits(53)
        request = RemoteRequest(
            self.tokenizer, tokens, params, ids=ids, max_tokens=max_tokens, seed=seed, priority=priority,
            timeout_s=timeout_s, listener=listener, cache_scope=cache_scope,
        )  # fmt: skip
        request._wake = lambda: self._wake(request)
        with self._lock:
            if self._closing:
                raise closed()
            if len(self._active) >= self.max_running:
                raise RequestError(
                    f"{len(self._active)} requests are running at {self.link.url}, which is all this server sends it "
                    "at a time. Try again when some have finished.",
                    status=429,
                    type="rate_limit_error",
                    retry_after_s=1.0,
                )
            self._active[request] = None
            self._loop.call_soon_threadsafe(self._start, request)  # under the lock: before `close` stops the loop
        return request

    @property
    def is_alive(self) -> bool:
        """Whether the upstream answered when it was last asked."""
        return not self._closing and self._reachable

    def occupancy(self) -> tuple[int, int]:
        """Requests that are elsewhere now; what waits there is not known."""
        return len(self._active), 0

    def stats(self) -> EngineStats:
        """What went through; figures of steps and memory are the upstream's own."""
        return EngineStats(
            running=len(self._active), waiting=0, rounds=0, prompt_tokens=self._prompt_tokens,
            sampled_tokens=self._sampled_tokens, tokens_per_step=0.0, busy_s=0.0, preemptions=0, failed_steps=0,
            finished=dict(self._finished), state_bytes={}, charged_bytes=0, max_state_bytes=None,
        )  # fmt: skip

    def requests(self) -> list[RequestView]:
        """The requests that are elsewhere, oldest first."""
        with self._lock:
            active = list(self._active)
        return [
            RequestView(
                number=number, phase="answering" if one.events else "reading", prompt_tokens=len(one.prompt_ids),
                read_tokens=len(one.prompt_ids) if one.events else 0, cached_tokens=0,
                output_tokens=one.usage.completion_tokens, max_tokens=one.max_tokens, priority=one.priority,
                age_s=one.age_s, scope=one.cache_scope,
            )
            for number, one in enumerate(active)
        ]  # fmt: skip

    def step_log(self) -> list[StepRecord]:
        """Steps happen elsewhere."""
        return []

    def aside(self, work: Any) -> Future[Any]:
        """Raises: RequestError: there is no model here to run anything on."""
        raise RequestError("This model runs on another server, which cannot be asked what its layers picked.")

    def close(self) -> None:
        """End what runs (status 503) and stop the thread. May be called twice."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---------------------------------------------------------------- the thread of the connection

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        poll = self._loop.create_task(self._poll())
        self._loop.run_forever()
        left = [poll, *(task for task in self._active.values() if task is not None)]
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.run_until_complete(self.link.close())
        self._loop.close()

    def _start(self, request: RemoteRequest) -> None:
        self._active[request] = self._loop.create_task(self._serve(request))

    def _wake(self, request: RemoteRequest) -> None:
        """The request was cancelled."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, request)

    def _cancel(self, request: RemoteRequest) -> None:
        task = self._active.get(request)
        if task is not None:
            task.cancel()

    async def _serve(self, request: RemoteRequest) -> None:
        """Run one request to its end, whatever it is; leaving closes the connection, which ends it upstream."""
        end: FinishReason | None = None
        error: RequestError | None = None
        try:
            if request.cancelled:
                raise asyncio.CancelledError
            async with asyncio.timeout(request.timeout_s):
                end = await self._read(request)
        except asyncio.CancelledError:
            end, error = "cancelled", None if request.cancelled else closed()
        except TimeoutError:
            end = "timeout"
        except RequestError as refusal:
            error = refusal
        except httpx2.HTTPError as failure:
            self._reachable = not isinstance(failure, httpx2.ConnectError)
            error = unreachable(self.link, failure, request.age_s)
        except Exception as failure:
            logger.exception("reading the upstream's answer failed")
            error = Broken(self.link, f"{type(failure).__name__}: {failure}").refusal()
        with self._lock:
            del self._active[request]
            self._finished["error" if error is not None or end is None else end] += 1
            self._prompt_tokens += len(request.prompt_ids)
            self._sampled_tokens += request.usage.completion_tokens
        if error is not None:
            request.fail(error)
            return
        if not request.taken.done():
            request.taken.set_result(None)
        request.deliver(TokenEvent(id=None, finish_reason=end))

    async def _read(self, request: RemoteRequest) -> FinishReason:
        """Deliver the upstream's text as it comes; returns why it ended."""
        scope = hashlib.sha256(request.cache_scope.encode()).hexdigest() if request.cache_scope else None
        body = request_body(self.link, request.prompt_ids, request.params, request.max_tokens, request.seed, scope)
        finish: FinishReason | None = None
        characters = 0
        async with self.link.stream(body) as deltas:
            self._reachable, self._heard = True, time.monotonic()
            request.taken.set_result(None)
            request.mark_started()
            async for delta in deltas:
                text = delta.text.removesuffix(EOS)  # some servers send the end token's own text
                if text:
                    request.mark_token()
                    characters += len(text)
                    request.deliver(TokenEvent(id=None, text=text))
                self._note(request, delta)
                finish = delta.finish or finish
        if finish is None:
            raise Broken(self.link, f"its answer ended after {characters:,} characters without saying why").refusal()
        return finish

    def _note(self, request: RemoteRequest, delta: Delta) -> None:
        if delta.usage is not None:
            request.tell_usage(*delta.usage)
        if delta.stop_string is not None:
            request.stop_string = delta.stop_string

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if time.monotonic() - self._heard < POLL_S:
                continue
            self._reachable = await self.link.answers()


@dataclass(frozen=True)
class UpstreamSettings:
    """Where a model runs, in the place of `EngineSettings`. Source of the fields: `upstream_wire.connect`."""

    url: str
    model: str
    dialect: Dialect
    context_limit: int
    key: str | None = None
    patience_s: float = 600.0
    max_running: int = 256

    @contextmanager
    def open(self, model: Any, tokenizer: Any) -> Iterator[RemoteEngine]:
        """The engine; `model` needs a `cfg` only."""
        link = Link(self.url, self.model, self.dialect, self.key, self.patience_s)
        with RemoteEngine(
            link, tokenizer, model.cfg, context_limit=self.context_limit, max_running=self.max_running
        ) as engine:
            yield engine
