"""One assistant turn from a chat request to the pieces of its reply: the path that all dialects share.

Chat completions, Anthropic messages and Responses each turn their body into a `ChatRequest`, start a turn here, and
spell its pieces in their own words.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from rorqual import chat
from rorqual.chat import suppressed_ids
from rorqual.server.accounts import Ticket, account_of, owner_of
from rorqual.server.constraints import grammar_for
from rorqual.server.errors import named_as_sent
from rorqual.server.messages import ChatPrompt, build_prompt
from rorqual.server.metadata import metadata
from rorqual.server.pieces import Piece
from rorqual.server.pins import spans_of
from rorqual.server.replies import ReplyReader, exactness_body
from rorqual.server.schema import ChatRequest
from rorqual.server.served import ServedModel
from rorqual.server.service import Service
from rorqual.server.streams import TokenStream

DEFAULT_MAX_TOKENS = 8192


@dataclass(frozen=True)
class Turn:
    """A reply being made. Read it once: `pieces` as it comes, or `whole`.

    asked: the model's name in the request. owner: whose conversation it is, over all keys.
    """

    service: Service
    served: ServedModel
    asked: str
    owner: str
    prompt: ChatPrompt
    stream: TokenStream
    reader: ReplyReader
    ticket: Ticket

    @property
    def id(self) -> str:
        """Of the answer, also for `/engine/picks`."""
        return self.stream.request.id

    async def pieces(self, patience_s: float) -> AsyncIterator[list[Piece]]:
        """Pieces in order, those that are ready together; an empty list after `patience_s` without any.

        The last piece holds `chat.Finished`. Raises: the RequestError of a request that failed.
        """
        async for batch in self.stream.batches(patience_s):
            ready = [piece for event in batch for piece in self.reader.read(event)]
            if ready and isinstance(ready[-1].event, chat.Finished):
                self._remember()
                await self.ticket.settle(self.reader.finished.finish_reason)
            if ready or not batch:
                yield ready

    async def whole(self, http: HttpRequest, each: Callable[[Piece], None] | None = None) -> chat.Finished:
        """The finished reply; `each` sees its pieces first.

        Raises: RequestError, and ClientGone when the client went away before it was there.
        """
        for event in await self.stream.collect(http):
            for piece in self.reader.read(event):
                if each is not None:
                    each(piece)
        self._remember()
        await self.ticket.settle(self.reader.finished.finish_reason)
        return self.reader.finished

    def usage(self) -> dict[str, Any]:
        """The usage object of chat completions, true once the turn is over."""
        return self.reader.usage(self.stream.request.usage)

    def beside(self) -> dict[str, Any]:
        """What a finished answer says beyond the API, whichever dialect it is in: `exactness` and `rorqual`."""
        request, restored = self.stream.request, self.prompt.restored
        about = {"model": self.served.name, **metadata(request), "cost": self.ticket.cost(self.usage())}
        if restored is not None:
            about["continuity"] = restored.to_dict()
        return {"exactness": exactness_body(request), "rorqual": about}

    def _remember(self) -> None:
        if self.service.continuity is not None:
            answer = self.reader.finished
            self.service.continuity.remember(self.owner, self.prompt.messages, answer.message, answer.sampled)


async def start(
    body: ChatRequest,
    service: Service,
    http: HttpRequest | None,
    served: ServedModel | None = None,
    *,
    reasoning_name: str = "reasoning_content",
    forces_thinking: bool | None = None,
    sent_as: Mapping[str, str] | None = None,
    lower_max_tokens: bool = False,
) -> Turn:
    """Check the request, render its prompt and hand it to the engine; call it inside the event loop.

    http: the exchange it is for, which says who asks; None for nobody in particular.
    served: the model, where the dialect has its own way of finding it by name.
    reasoning_name: what the dialect calls `reasoning_content`, for the refusal of a turn without.
    forces_thinking: whether a call can be forced in thinking mode, where the dialect says; as the server is set up
        otherwise.
    sent_as: fields of `body` that the dialect calls otherwise (`{"max_tokens": "max_output_tokens"}`), for errors.
    lower_max_tokens: lower it to what there is room for, instead of refusing.
    Raises: RequestError for anything that cannot be served, before a byte is sent.
    """
    served = served or service.find(body.model)
    owner = owner_of(http, body.owner)
    names = dict(sent_as or {})
    if body.max_completion_tokens is not None:
        body.max_tokens, names["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    with named_as_sent(**names):
        # Rendering and encoding a long history takes a while; other requests stream on meanwhile.
        prompt = await run_in_threadpool(build_prompt, body, served, service, owner, reasoning_name)
        if forces_thinking is None:
            forces_thinking = service.behaviour.forced_calls_while_thinking
        grammar = grammar_for(body, prompt, forces_thinking=forces_thinking)
        pins = await run_in_threadpool(spans_of, body.rorqual, prompt.tokens, served.engine, served.tokenizer)
        if grammar is not None:  # the first of its kind is compiled, which takes a while
            await run_in_threadpool(served.engine.grammars.constraint, grammar)
        params = served.params(
            body,
            len(prompt.tokens),
            limit=served.max_output,
            default=DEFAULT_MAX_TOKENS,
            lower=lower_max_tokens,
            logprobs=bool(body.logprobs),
            top_logprobs=body.top_logprobs or 0,
            suppress_token_ids=suppressed_ids(
                served.tokenizer, thinking=prompt.opens_reasoning, tools=bool(prompt.tools)
            ),
            grammar=grammar,
        ).replace(pin=pins)
        ticket = await service.accounts.admit(
            http,
            served.name,
            prompt_tokens=len(prompt.tokens),
            max_tokens=params.max_tokens or served.max_output,
            user_id=body.owner,
        )
        stream = TokenStream(served.engine, prompt.tokens, params, body.rorqual, owner)
    if service.recent is not None:
        service.recent.add(served, stream.request, account_of(http))
    logprobs, opens = bool(body.logprobs), prompt.opens_reasoning
    reader = ReplyReader(served.tokenizer, prompt.thinking, prompt.tools, logprobs=logprobs, opens_reasoning=opens)
    turn = Turn(service, served, body.model, owner, prompt, stream, reader, ticket)
    ticket.follow(stream.request, turn.usage)
    await stream.accepted(service.keep_alive_s)
    return turn
