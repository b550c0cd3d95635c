"""What the gateway says to an upstream and reads from it: requests passed on, answers whole and streamed, refusals.

Requests go on as they came, with the client's own key unless the gateway has one. An upstream's refusal comes back word
for word, so that a client sees what it would have seen without a gateway.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import httpx2

from rorqual.errors import RequestError
from rorqual.referee.answer import TEXT_OF, Answer, read_answer, read_message

CONNECT_S: Final = 10.0
_PASSED_ON: Final = (
    "content-type", "accept", "user-agent", "openai-organization", "openai-project", "openai-beta", "anthropic-version",
    "anthropic-beta", "http-referer", "x-title", "idempotency-key", "x-client-request-id",
)  # fmt: skip
_PASSED_BACK: Final = ("content-type", "retry-after", "x-request-id", "request-id", "cache-control", "location")
_PREFIXES_BACK: Final = ("x-ratelimit-", "openai-", "x-ds-", "anthropic-")
READ_FIELDS: Final = ("role", "content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal")
"""Of a delta, those that are put together here; any other travels on as it came."""


class UpstreamRefusal(RequestError):
    """An upstream's own refusal. body, headers: as it sent them."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str], url: str) -> None:
        self.body, self.headers = body, headers
        words = _words(body)
        again = headers.get("retry-after", "")
        super().__init__(
            f"The upstream server {url} answered with HTTP {status}: {words}",
            status=status,
            type="upstream_error",
            retry_after_s=float(again) if again.isdigit() else None,
        )


class Upstream:
    """One server behind the gateway. url: without `/v1`. key: sent in place of the client's.

    patience_s: longest silence. transport: for tests; httpx2's own otherwise.
    """

    errors = httpx2.HTTPError
    """What a connection raises while a response is read; `failure` says it in words."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        patience_s: float = 600.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._address, self._key, self.patience_s = url.rstrip("/").removesuffix("/v1"), key, patience_s
        self.url = re.sub(r"(?<=://)[^/]*@", "", self._address)  # told to clients: without a name and password
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(patience_s, connect=CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256),
            trust_env=False,
            transport=transport,
        )

    @property
    def has_key(self) -> bool:
        return self._key is not None

    def headers(self, sent: Mapping[str, str]) -> dict[str, str]:
        """Of a request that is passed on."""
        out = {name: sent[name] for name in _PASSED_ON if name in sent}
        out["accept-encoding"] = "identity"  # answers are read on their way
        if self._key is not None:
            out["authorization"] = f"Bearer {self._key}"
        else:
            out.update({name: sent[name] for name in ("authorization", "x-api-key") if name in sent})
        return out

    @asynccontextmanager
    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, query: str = ""
    ) -> AsyncIterator[httpx2.Response]:
        """The response, its body unread, whatever its status. Raises: RequestError 502 or 504 when there is none."""
        url = f"{self._address}{path}" + (f"?{query}" if query else "")
        try:
            request = self._client.build_request(method, url, headers=headers, content=body)
            response = await self._client.send(request, stream=True)
        except httpx2.HTTPError as error:
            raise self.failure(error) from error
        try:
            yield response
        finally:
            await response.aclose()

    async def whole(self, path: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> Answer:
        """An answer that is not streamed. Raises: UpstreamRefusal, RequestError."""
        async with self.send("POST", path, headers, encode(body)) as response:
            content = await self.read(response)
            if response.status_code != 200:
                raise self.refusal(response, content)
        try:
            return read_answer(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise self.broken(f"it sent what is no JSON ({error})") from error

    async def streamed(
        self, path: str, headers: Mapping[str, str], body: Mapping[str, Any], each: Callable[[Mapping[str, Any]], None]
    ) -> Answer:
        """A streamed answer, put together; `each` sees the first choice of each chunk that has a delta, as it comes.

        Raises: UpstreamRefusal, RequestError, the latter also for a stream that breaks off.
        """
        async with self.send("POST", path, headers, encode(body)) as response:
            if response.status_code != 200:
                raise self.refusal(response, await self.read(response))
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                return self._at_once(await self.read(response), each)
            reader, assembler = SseReader(), Assembler()
            try:
                async for piece in response.aiter_bytes():
                    for data in reader.feed(piece):
                        if data == "[DONE]":
                            return self._finished(assembler)
                        choice = self._take(assembler, data)
                        if choice is not None:
                            each(choice)
            except httpx2.HTTPError as error:
                raise self.failure(error) from error
        return self._finished(assembler)

    def _at_once(self, content: bytes, each: Callable[[Mapping[str, Any]], None]) -> Answer:
        """A server that does not stream: its whole answer, as one delta."""
        try:
            answer = read_answer(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise self.broken(f"it sent neither a stream nor JSON ({error})") from error
        each({"delta": {"content": answer.content, "reasoning_content": answer.reasoning}})
        return answer

    def _take(self, assembler: Assembler, data: str) -> Mapping[str, Any] | None:
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.broken(f"it sent an event that is no JSON ({error})") from error
        if isinstance(chunk, dict) and chunk.get("error"):
            raise self.broken(_words(data.encode()))
        try:
            return assembler.feed(chunk)
        except (TypeError, ValueError, AttributeError) as error:
            raise self.broken(f"it sent an event that is no part of an answer ({error})") from error

    def _finished(self, assembler: Assembler) -> Answer:
        if not assembler.has_begun:
            raise self.broken("its stream held no answer")
        if assembler.finish is None:
            raise self.broken("its answer ended without saying why, so it may be incomplete")
        return assembler.answer()

    async def read(self, response: httpx2.Response) -> bytes:
        """The body. Raises: RequestError when it breaks off."""
        try:
            return bytes(await response.aread())
        except httpx2.HTTPError as error:
            raise self.failure(error) from error

    def refusal(self, response: httpx2.Response, content: bytes) -> UpstreamRefusal:
        """A response with an error status as the exception that carries it back."""
        return UpstreamRefusal(response.status_code, content, headers_back(response.headers), self.url)

    def failure(self, error: httpx2.HTTPError) -> RequestError:
        """What a failed connection means for our client."""
        if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
            return RequestError(
                f"The upstream server {self.url} sent nothing for {self.patience_s:g} s, so this request was given up. "
                "Try again, or raise --upstream-timeout.",
                status=504,
                type="upstream_error",
            )
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return RequestError(
                f"The upstream server {self.url} cannot be reached ({error or type(error).__name__}). Check that it "
                "runs and that --upstream is its address.",
                status=502,
                type="upstream_error",
            )
        return self.broken(f"the connection was lost ({type(error).__name__}: {error})")

    def broken(self, why: str) -> RequestError:
        """An upstream that failed while it answered."""
        return RequestError(
            f"The upstream server {self.url} broke off: {why}. Send the request again; if it fails again, look at that "
            "server's log.",
            status=502,
            type="upstream_error",
        )

    async def close(self) -> None:
        await self._client.aclose()


def encode(body: Mapping[str, Any]) -> bytes:
    """A request body; half a surrogate pair, which UTF-8 cannot carry, stays escaped."""
    return json.dumps(body, ensure_ascii=True, separators=(",", ":")).encode()


def headers_back(headers: Mapping[str, str]) -> dict[str, str]:
    """Of an upstream's response, those that mean something to its client."""
    out = {name: headers[name] for name in _PASSED_BACK if name in headers}
    out.update({name: value for name, value in headers.items() if name.lower().startswith(_PREFIXES_BACK)})
    return out


def _words(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        pass
    return str(text).strip()[:500] or "no reason given"


class SseReader:
    """Bytes of an event stream to the data of its events, whatever the pieces are cut into."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of a line that has not ended, joined when it does: a line may be long
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        if b"\n" not in piece:
            self._rest.append(piece)
            return
        *lines, rest = b"".join([*self._rest, piece]).split(b"\n")
        self._rest = [rest]
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield data.decode("utf-8", "replace")


class Assembler:
    """Chunks of a streamed chat completion to the whole answer; choices beyond the first are left out."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[Any] = []
        self._refusal: list[str] = []
        self._others: list[dict[str, Any]] = []
        self._reasoning_name = "reasoning_content"
        self._is_legacy = False
        self._usage: Any = None
        self._envelope: dict[str, Any] = {}
        self.finish: str | None = None
        self.has_begun = False

    def feed(self, chunk: Any) -> Mapping[str, Any] | None:
        """The first choice, where the chunk has one with a delta."""
        if not isinstance(chunk, dict):
            return None
        if not self._envelope:
            self._envelope = {key: value for key, value in chunk.items() if key not in ("choices", "usage")}
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        choices = chunk.get("choices")
        choice = next((one for one in choices or () if isinstance(one, dict) and one.get("index", 0) == 0), None)
        if choice is None:
            return None
        self.has_begun = True
        if isinstance(choice.get("finish_reason"), str):
            self.finish = choice["finish_reason"]
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            self._logprobs += logprobs["content"]
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return None
        self._take(delta)
        return choice

    def _take(self, delta: Mapping[str, Any]) -> None:
        if isinstance(delta.get("content"), str):
            self._content.append(delta["content"])
        name = "reasoning" if delta.get("reasoning_content") is None else "reasoning_content"
        if isinstance(delta.get(name), str):
            self._reasoning.append(delta[name])
            self._reasoning_name = name
        if isinstance(delta.get("refusal"), str):
            self._refusal.append(delta["refusal"])
        for position, part in enumerate(delta.get("tool_calls") or ()):
            if isinstance(part, dict):
                self._call(part, position)
        if isinstance(delta.get("function_call"), dict):
            self._call({"index": 0, "function": delta["function_call"]}, 0)
            self._is_legacy = True
        others = {key: value for key, value in delta.items() if key not in READ_FIELDS}
        if others:
            self._others.append(others)

    def _call(self, part: Mapping[str, Any], position: int) -> None:
        index = part.get("index")
        if not isinstance(index, int):  # some servers leave it out: a new id begins a new call
            known = [at for at, call in self._calls.items() if part.get("id") and call["id"] == part["id"]]
            index = known[0] if known else (len(self._calls) if part.get("id") else max(self._calls, default=position))
        call = self._calls.setdefault(index, {"id": None, "type": "function", "name": None, "text": []})
        for key, given in (("id", part.get("id")), ("type", part.get("type"))):
            if isinstance(given, str) and given:
                call[key] = given
        kind = call["type"] if call["type"] in TEXT_OF else "function"
        inner = part.get(kind)
        if isinstance(inner, dict):
            if isinstance(inner.get("name"), str) and inner["name"]:
                call["name"] = inner["name"]
            text = inner.get(TEXT_OF[kind])
            if isinstance(text, str):
                call["text"].append(text)
            elif text is not None:
                call["text"].append(json.dumps(text))

    def answer(self) -> Answer:
        """What the chunks add up to."""
        calls = [
            {"id": call["id"], "type": kind, kind: {"name": call["name"], TEXT_OF[kind]: "".join(call["text"])}}
            for _, call in sorted(self._calls.items())
            for kind in [call["type"] if call["type"] in TEXT_OF else "function"]
        ]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content) if self._content else None}
        if self._reasoning:
            message[self._reasoning_name] = "".join(self._reasoning)
        if self._refusal:
            message["refusal"] = "".join(self._refusal)
        if calls and self._is_legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        logprobs = {"content": self._logprobs} if self._logprobs else None
        answer = read_message(message, self.finish, self._usage, logprobs)
        return replace(answer.within(self._envelope), deltas=tuple(self._others))
