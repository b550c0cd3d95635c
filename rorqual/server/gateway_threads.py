"""Reasoning and spelling of earlier turns, for clients that send them back otherwise than they came.

Some upstreams refuse a tool turn without the reasoning before it. What was given is put back; what nobody has any more
is sent as empty reasoning, which such upstreams take, and the model thinks again from what it sees.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, TypeVar

from rorqual.errors import RequestError
from rorqual.referee import Continuity
from rorqual.referee.reasons import Finding, repaired

Result = TypeVar("Result")
Missing = Literal["rethink", "error"]
"""What happens to a turn whose reasoning is gone: `rethink` without it, told in the answer, or a clear error."""

_MARK: Final = "reasoning_content"


class Threads:
    """continuity: None where nothing is kept."""

    def __init__(self, continuity: Continuity | None, missing: Missing = "rethink") -> None:
        self._continuity, self._missing = continuity, missing
        self._want: set[str] = set()
        on_disk = continuity is not None and continuity.is_on_disk
        self._thread = ThreadPoolExecutor(1, "continuity") if on_disk else None

    @property
    def keeps(self) -> bool:
        """Whether anything is put back."""
        return self._continuity is not None

    def close(self) -> None:
        """Write what is waiting and close what is open."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._continuity is not None:
            self._continuity.close()

    async def _beside(self, work: Callable[..., Result], *given: Any, **more: Any) -> Result:
        """What reads or writes a file does not hold up the event loop."""
        if self._thread is None:
            return work(*given, **more)
        return await asyncio.wrap_future(self._thread.submit(work, *given, **more))

    async def restore(self, owner: str, body: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Finding]]:
        """The request with what its client dropped or spelled otherwise put back; the very object where nothing was."""
        messages = body.get("messages")
        if self._continuity is None or not isinstance(messages, list) or not _has_answers(messages):
            return body, []
        plain = [_plain(message) for message in messages]
        back = await self._beside(self._continuity.restore, owner, plain, _thinks(body))
        out = list(messages)
        for i in back.as_sampled:
            out[i] = {**out[i], "tool_calls": back.messages[i]["tool_calls"]}
        for i in back.restored:
            out[i] = {**out[i], _MARK: back.messages[i][_MARK]}
        found = []
        if back.restored or back.as_sampled:
            body = {**body, "messages": out}
        if back.restored:
            found.append(repaired("reasoning_restored", f"reasoning put back into {len(back.restored)} messages"))
        if back.missing and str(body.get("model")) in self._want:
            body, more = self.without(body)
            found += more
        return body, found

    async def remember(self, owner: str, body: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        """Keep an answer that was given to the conversation of `body`."""
        messages = body.get("messages")
        if self._continuity is None or not isinstance(messages, list):
            return
        answer = _plain(message)
        if answer.get("tool_calls") or answer.get(_MARK):
            before = [_plain(one) for one in messages]
            await self._beside(self._continuity.remember, owner, before, answer, spelling=True)

    def without(self, body: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Finding]]:
        """The request with empty reasoning where none is known. Raises: RequestError where that is not wanted."""
        messages = list(body.get("messages") or ())
        lacking = [
            i for i, one in enumerate(messages)
            if isinstance(one, Mapping) and one.get("role") == "assistant" and one.get(_MARK) is None
        ]  # fmt: skip
        if not lacking:
            return body, []
        if self._missing == "error":
            raise RequestError(
                f"messages[{lacking[0]}] has no `{_MARK}`, the upstream wants it, and this gateway does not have it: "
                "another server gave it, or it was too long ago. Send the message as it was received, or start the "
                "gateway with --missing-reasoning rethink.",
                param=f"messages[{lacking[0]}]",
                code="reasoning_missing",
            )
        for i in lacking:
            messages[i] = {**messages[i], _MARK: ""}
        says = f"the reasoning of {len(lacking)} earlier messages is gone; the model thinks again without"
        return {**body, "messages": messages}, [Finding("reasoning_missing", says, "warn")]

    def wants_reasoning(self, body: Mapping[str, Any], refusal: bytes) -> bool:
        """Whether an upstream's 400 is about reasoning that was not sent; it is known of the model from then on."""
        if _MARK.encode() not in refusal:
            return False
        self._want.add(str(body.get("model")))
        return True


def owner_with_key(owner: str, headers: Mapping[str, str]) -> str:
    """Whose a conversation is: who asked here, with which key of the upstream."""
    key = headers.get("authorization") or headers.get("x-api-key") or ""
    return f"{owner}|{hashlib.sha256(key.encode()).hexdigest()[:16]}" if key else owner


def _has_answers(messages: Sequence[Any]) -> bool:
    return any(isinstance(one, Mapping) and one.get("role") == "assistant" for one in messages)


def _thinks(body: Mapping[str, Any]) -> bool:
    thinking = body.get("thinking")
    return not (isinstance(thinking, Mapping) and thinking.get("type") == "disabled")


def _plain(message: Any) -> dict[str, Any]:
    """A message in the shape that `Continuity` knows answers by."""
    if not isinstance(message, Mapping):
        return {"role": "", "content": ""}
    out = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        out["content"] = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if out.get(_MARK) is None and isinstance(message.get("reasoning"), str):
        out[_MARK] = message["reasoning"]
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        out.pop("tool_calls", None)
    return out


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return (
        isinstance(function, Mapping)
        and isinstance(call.get("id"), str)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str)
    )
