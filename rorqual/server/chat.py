"""POST /chat/completions, streamed and whole, in the order of chunks DeepSeek's API sends.

Unlike the hosted service, temperature and top_p are honoured in thinking mode. Stop strings end the output
wherever they come, in the reasoning too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.chat import suppressed_ids
from rorqual.errors import RequestError
from rorqual.server.errors import named_as_sent
from rorqual.server.messages import build_prompt
from rorqual.server.metadata import metadata
from rorqual.server.replies import Piece, ReplyReader, exactness_body
from rorqual.server.schema import ChatRequest
from rorqual.server.served import Envelope, ServedModel, find_model
from rorqual.server.streams import DONE, KEEP_ALIVE, EventStream, TokenStream, sse, sse_error

DEFAULT_MAX_TOKENS = 8192


async def answer(
    body: ChatRequest, http: HttpRequest, models: Mapping[str, ServedModel], keep_alive_s: float
) -> Response:
    """Raises: RequestError for anything that cannot be served, before a byte is sent."""
    served = find_model(models, body.model)
    body.max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    # Rendering and encoding a long history takes a while; other requests stream on meanwhile.
    prompt = await run_in_threadpool(build_prompt, body, served.tokenizer, served.revision)
    sent = {} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
    with named_as_sent(**sent):
        params = served.params(
            body,
            len(prompt.tokens),
            limit=served.max_output,
            default=DEFAULT_MAX_TOKENS,
            logprobs=bool(body.logprobs),
            top_logprobs=body.top_logprobs or 0,
            suppress_token_ids=suppressed_ids(served.tokenizer, thinking=prompt.thinking, tools=bool(prompt.tools)),
        )
        stream = TokenStream(served.engine, prompt.tokens, params, body.rorqual)
    reader = ReplyReader(served.tokenizer, prompt.thinking, prompt.tools, logprobs=bool(body.logprobs))
    if body.stream:
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        lines = _lines(stream, reader, served.name, wants_usage, keep_alive_s)
        return EventStream(lines, stream.request)
    for event in await stream.collect(http):
        for _ in reader.read(event):
            pass
    choice = {
        "message": reader.message,
        "logprobs": reader.whole_logprobs(),
        "finish_reason": reader.finish_reason,
    }
    envelope = Envelope("chat.completion", served.name)
    more = {"exactness": exactness_body(stream.request), "rorqual": metadata(stream.request)}
    return JSONResponse(envelope.body(choice, usage=reader.usage(stream.request.usage), **more))


async def _lines(
    stream: TokenStream, reader: ReplyReader, model: str, wants_usage: bool, keep_alive_s: float
) -> AsyncIterator[str]:
    """The whole stream: role, deltas, one last chunk with the finish reason and the usage, `[DONE]`."""
    body = partial(_chunk, Envelope("chat.completion.chunk", model))
    between = {"usage": None} if wants_usage else {}
    yield sse(body(reader.opening(), None, **between))
    try:
        async for batch in stream.batches(keep_alive_s):
            if not batch:
                yield KEEP_ALIVE
            for event in batch:
                for piece in reader.read(event):
                    if reader.finish_reason:
                        more = {
                            "usage": reader.usage(stream.request.usage), "exactness": exactness_body(stream.request),
                            "rorqual": metadata(stream.request),
                        }  # fmt: skip
                        yield sse(body(piece, reader.finish_reason, **more)) + DONE
                    else:
                        yield sse(body(piece, None, **between))
    except RequestError as error:
        yield sse_error(error)


def _chunk(envelope: Envelope, piece: Piece, finish_reason: str | None, **more: object) -> dict[str, object]:
    choice = {"delta": piece.delta, "logprobs": piece.logprobs, "finish_reason": finish_reason}
    return envelope.body(choice, **more)
