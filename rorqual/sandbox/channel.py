"""One connection to a guest agent: hello, requests with their answers, and events.

A connection belongs to one client process and one attach epoch. When another client says hello with a higher epoch,
this one gets `StaleEpoch` for everything from then on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import Callable

from rorqual.errors import SandboxError
from rorqual.sandbox.errors import StaleEpoch, TransportError
from rorqual.sandbox.wire import CLIENT, NONCE_BYTES, Fields, Forged, Parser, Tag, Type, Value, frame, pack, session_key

Event = Callable[[int, Fields], None]


class AgentRefusal(SandboxError):
    """The agent answered with an error number; callers that know more turn it into what the user sees."""

    def __init__(self, number: int, text: str) -> None:
        number = number if 0 < number < 4096 else errno.EIO  # as far as the kernel's go
        super().__init__(f"the sandbox's agent refused: {text[:2000]} (errno {number}: {os.strerror(number)}).")
        self.number = number
        self.text = text

    def __reduce__(self) -> tuple[type[AgentRefusal], tuple[int, str]]:
        return type(self), (self.number, self.text)


class Channel:
    """Requests to the agent over a stream. Make one with `Channel.open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, event: Event) -> None:
        self._reader = reader
        self._writer = writer
        self._secret = secret
        self._key = secret
        self._sent = 0
        self._parser = Parser(secret)
        self._event = event
        self._waiting: dict[int, asyncio.Future[Fields]] = {}
        self._last_request = 0
        self._broken: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        secret: bytes,
        epoch: int,
        event: Event,
        provision: list[tuple[Tag, Value]] | None = None,
    ) -> Channel:
        """Say hello and wait for the welcome; `provision` goes to an agent that nobody has claimed yet.

        Raises: StaleEpoch when a later epoch drives the sandbox; TransportError when the stream ends first.
        """
        channel = cls(reader, writer, secret, event)
        nonce = secrets.token_bytes(NONCE_BYTES)
        fields: list[tuple[Tag, Value]] = [(Tag.NONCE, nonce), (Tag.EPOCH, epoch)]
        if provision is not None:
            fields += [(Tag.SECRET, secret), *provision]
        writer.write(frame(secret, 0, CLIENT, Type.HELLO, 0, pack(fields)))
        try:
            while True:
                found = channel._parser.next()
                if found is None:
                    data = await reader.read(1 << 16)
                    if not data:
                        raise TransportError("the sandbox's agent closed the connection before it answered the hello.")
                    channel._parser.feed(data)
                elif found.fields.bytes(Tag.NONCE) == nonce:
                    break
                else:
                    channel._parser.number = 0  # an answer to an earlier client
            if found.kind == Type.STALE:
                raise _stale(found.fields.number(Tag.EPOCH), epoch)
        except BaseException as error:
            writer.close()
            if isinstance(error, OSError):
                raise TransportError(
                    f"the connection to the sandbox's agent broke during the hello: {error}"
                ) from error
            raise
        key = session_key(secret, nonce, found.fields.bytes(Tag.TOKEN))
        channel._key = key
        channel._parser.expect(key)
        channel._task = asyncio.get_running_loop().create_task(channel._read())
        return channel

    @property
    def open_now(self) -> bool:
        """Whether requests can still be sent."""
        return self._broken is None

    async def request(self, kind: Type, fields: list[tuple[Tag, Value]] | None = None) -> Fields:
        """Send a request and wait for its answer.

        Raises: AgentRefusal; TransportError when the connection breaks first; StaleEpoch.
        """
        if self._broken is not None:
            raise self._broken
        self._last_request += 1
        number = self._last_request
        future: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._writer.write(frame(self._key, self._sent, CLIENT, kind, number, pack(fields or [])))
        self._sent += 1
        try:
            await self._writer.drain()
            return await future
        except OSError as error:
            raise self._break(TransportError(f"the connection to the sandbox's agent broke: {error}")) from error
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # said by another error already, perhaps

    async def _read(self) -> None:
        try:
            while True:
                while found := self._parser.next():
                    self._take(found.kind, found.request, found.fields)
                data = await self._reader.read(1 << 18)
                if not data:
                    break
                self._parser.feed(data)
            self._break(TransportError("the sandbox's agent closed the connection."))
        except OSError as error:
            self._break(TransportError(f"the connection to the sandbox's agent broke: {error}"))
        except Exception as error:  # whatever the other side sent, those who wait are told
            self._break(
                TransportError(
                    f"the sandbox's agent sent what no agent sends ({error or type(error).__name__}): something inside "
                    "speaks in its place. Close the sandbox.",
                    retryable=False,
                )
            )

    def _take(self, kind: int, request: int, fields: Fields) -> None:
        if kind < Type.WELCOME:
            raise Forged(f"a frame of type {kind}")
        if kind == Type.STALE:
            self._break(_stale(None, None))
            return
        future = self._waiting.get(request) if request else None
        if future is None:
            self._event(kind, fields)
        elif not future.done():
            if kind == Type.ERROR:
                future.set_exception(AgentRefusal(fields.number(Tag.ERRNO), fields.text(Tag.TEXT)))
            else:
                future.set_result(fields)

    def _break(self, error: Exception) -> Exception:
        if self._broken is None:
            self._broken = error
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
            self._event(0, Fields(b""))
            self._writer.close()
        return self._broken

    async def close(self) -> None:
        """End the connection; the sandbox and its commands go on."""
        self._break(TransportError("this client closed its connection."))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _stale(theirs: int | None, mine: int | None) -> StaleEpoch:
    numbers = f" (epoch {theirs}, ours is {mine})" if theirs is not None else ""
    return StaleEpoch(
        f"another process drives this sandbox now{numbers}; this one may no longer act on it. "
        "Sandbox.connect(id, takeover=True) would take it back."
    )
