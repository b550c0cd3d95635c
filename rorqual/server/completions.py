"""POST /beta/completions: continue a text, or fill the gap between `prompt` and `suffix`.

With a suffix both texts are taken literally. Without one the prompt is the model's raw input, markers
included, so a prompt in the chat format can be sent as it is. Either way a begin-of-sentence token comes
first. A list of token ids is taken as it is, with nothing before it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rorqual import chat
from rorqual.engine import TokenEvent, TokenScore
from rorqual.errors import RequestError
from rorqual.server.accounts import Ticket, owner_of
from rorqual.server.errors import named_as_sent
from rorqual.server.metadata import metadata
from rorqual.server.pins import spans_of
from rorqual.server.replies import api_reason, exactness_body, token_logprob, usage_body
from rorqual.server.schema import CompletionRequest
from rorqual.server.served import Envelope
from rorqual.server.service import Service
from rorqual.server.sse import DONE, KEEP_ALIVE, sse, sse_error, whole_answer
from rorqual.server.streams import EventStream, TokenStream
from rorqual.tokenizer import BOS, Tokenizer
from rorqual.tokenizer.tokenizer import clean_text

MAX_TOKENS = 4096


async def answer(body: CompletionRequest, http: HttpRequest, service: Service) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    served = service.find(body.model)
    if body.echo and body.logprobs is not None and body.suffix is not None:
        raise RequestError(
            "echo with logprobs is not supported for fill-in-the-middle, where prompt and suffix are one "
            "input. Leave out one of echo, logprobs and suffix.",
            param="echo",
        )
    tokens = await run_in_threadpool(_encode, body, served.tokenizer)
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise RequestError("Invalid logprobs value, the valid range of logprobs is [0, 20].", param="logprobs")
    # the API's own bound is that of filling gaps; whoever sends token ids stands in for a client with another
    limit = min(MAX_TOKENS, served.max_output) if isinstance(body.prompt, str) else served.max_output
    params = served.params(
        body,
        len(tokens),
        limit=limit,
        default=limit,
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        suppress_token_ids=chat.suppressed_ids_after(served.tokenizer, tokens),
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    params = params.replace(
        pin=await run_in_threadpool(spans_of, body.rorqual, tokens, served.engine, served.tokenizer)
    )
    ticket = await service.accounts.admit(
        http, served.name, prompt_tokens=len(tokens), max_tokens=params.max_tokens or limit, user_id=body.owner
    )
    with named_as_sent(messages="prompt"):
        stream = TokenStream(served.engine, tokens, params, body.rorqual, owner_of(http, body.owner))
    ticket.follow(stream.request, lambda: usage_body(stream.request.usage, None))
    await stream.accepted(service.keep_alive_s)
    writer = _Writer(served.tokenizer, body)
    if body.stream:
        return EventStream(_lines(stream, ticket, writer, body, service.keep_alive_s), stream.request)
    return await whole_answer(_body(stream, ticket, writer, body, http), service.keep_alive_s)


async def _body(
    stream: TokenStream, ticket: Ticket, writer: _Writer, body: CompletionRequest, http: HttpRequest
) -> dict[str, Any]:
    events = await stream.collect(http)
    pieces = [writer.opening(stream.request.prompt_scores)] if body.echo else []
    pieces += [writer.piece([event]) for event in events]
    choice = {
        "text": "".join(piece["text"] for piece in pieces),
        "finish_reason": api_reason(events[-1].finish_reason),
        "logprobs": _joined([piece["logprobs"] for piece in pieces]) if body.logprobs is not None else None,
    }
    more = await _ending(stream, ticket, api_reason(events[-1].finish_reason))
    return Envelope("text_completion", body.model).body(choice, **more)


async def _ending(stream: TokenStream, ticket: Ticket, finish_reason: str) -> dict[str, Any]:
    """Settle the ticket; what stands beside the last choice."""
    await ticket.settle(finish_reason)
    usage = usage_body(stream.request.usage, None)
    about = {**metadata(stream.request), "cost": ticket.cost(usage)}
    return {"usage": usage, "exactness": exactness_body(stream.request), "rorqual": about}


async def _lines(
    stream: TokenStream, ticket: Ticket, writer: _Writer, body: CompletionRequest, keep_alive_s: float
) -> AsyncIterator[str]:
    envelope = Envelope("text_completion", body.model)
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    between: dict[str, Any] = {"usage": None} if wants_usage else {}
    has_opened = not body.echo
    try:
        async for batch in stream.batches(keep_alive_s):
            if not batch:
                yield KEEP_ALIVE
                continue
            if not has_opened:  # the prompt's own log probabilities are known by now
                has_opened = True
                opening = writer.opening(stream.request.prompt_scores)
                yield sse(envelope.body({**opening, "finish_reason": None}, **between))
            for event in batch:
                piece = writer.piece([event])
                if event.finish_reason is not None:
                    choice = {**piece, "finish_reason": api_reason(event.finish_reason)}
                    more = await _ending(stream, ticket, choice["finish_reason"])
                    yield sse(envelope.body(choice, **more)) + DONE
                elif piece["text"] or piece["logprobs"]:
                    yield sse(envelope.body({**piece, "finish_reason": None}, **between))
    except RequestError as error:
        yield sse_error(error)


def _encode(body: CompletionRequest, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(body.prompt, str):
        if body.suffix is not None or body.echo:
            raise RequestError(
                "prompt is a list of token ids, which is the model's whole input. Leave suffix and echo out, or send "
                "text.",
                param="prompt",
            )
        return body.prompt
    if body.suffix is not None:
        for param, text in (("prompt", body.prompt), ("suffix", body.suffix)):
            if clean_text(text) != text:
                raise RequestError(
                    f"{param} holds half of a surrogate pair, which is no character and has no UTF-8 form. "
                    "Send the whole character, or remove the half.",
                    param=param,
                )
        rendered = chat.render_fim(body.prompt, body.suffix, add_default_bos_token=True)
        return tokenizer.encode_guarded(rendered.pieces())
    tokens = tokenizer.encode(body.prompt)
    return tokens if tokens[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *tokens]


class _Writer:
    """Makes `text` and `logprobs` of each piece and keeps count of the characters before it."""

    def __init__(self, tokenizer: Tokenizer, body: CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._echo = clean_text(body.prompt) if body.echo and isinstance(body.prompt, str) else ""
        self._top = body.logprobs
        self._offset = 0

    def opening(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The echoed prompt."""
        shown = list(scores)
        if not self._echo.startswith(BOS):
            shown = shown[1:]  # the begin-of-sentence token, which was not in the text
        logprobs = None
        if self._top is not None:
            # Offsets are those of each token's own text; a character cut between tokens counts with its last.
            decoder, offsets, offset = self._tokenizer.stream_decoder(), [], 0
            for score in shown:
                offsets.append(offset)
                offset += len(decoder.push(score.id))
            logprobs = self._logprobs([(s.id, s.logprob, s.top_logprobs) for s in shown], offsets)
        self._offset = len(self._echo)
        return {"text": self._echo, "logprobs": logprobs}

    def piece(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        text = "".join(event.text for event in events)
        logprobs = None
        if self._top is not None:
            scored = [(e.id, e.logprob, e.top_logprobs) for e in events if e.id is not None]
            logprobs = self._logprobs(scored, [self._offset] * len(scored))
        self._offset += len(text)
        return {"text": text, "logprobs": logprobs}

    def _text(self, token: int) -> str:
        """The token by name: its text, or `bytes:\\xf0\\x9f` for a piece of a character, as OpenAI has it."""
        entry = token_logprob(self._tokenizer, token, None)
        text: str = entry["token"]
        raw = self._tokenizer.token_bytes(token)
        return text if entry["bytes"] is None or text.encode() == raw else _bytes_name(raw)

    def _by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Log probabilities by name; two tokens that read alike both keep their entry."""
        named: dict[str, float] = {}
        for token, logprob in top:
            text = self._text(token)
            named[_bytes_name(self._tokenizer.token_bytes(token)) if text in named else text] = logprob
        return named

    def _logprobs(
        self, scored: Sequence[tuple[int, float | None, Sequence[tuple[int, float]]]], offsets: list[int]
    ) -> dict[str, Any]:
        return {
            "tokens": [self._text(token) for token, _, _ in scored],
            "token_logprobs": [logprob for _, logprob, _ in scored],
            "top_logprobs": [self._by_text(top) if logprob is not None else None for _, logprob, top in scored],
            "text_offset": offsets,
        }


def _bytes_name(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for part in parts for entry in part[name]] for name in names}
