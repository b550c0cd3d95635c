"""The trajectory log of one sandbox: every command, file operation, snapshot and pause, in one order.

It lies outside the sandbox, in its folder, as a journal of `Event` records. A command is written down before it starts
and again before its result is handed out, each time synced, so that after a crash it is known which calls ran:

    call_accepted (durable) -> start -> call_finished (durable) -> reply

A call with a key (`call=`) is answered from here once it has finished. Source: docs/sandbox.md, rules R1 to R6.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, replay_folder
from rorqual.sandbox.errors import OutcomeUnknown, ReplayDivergence, StaleEpoch
from rorqual.sandbox.spec import CommandResult

ACCEPTED, FINISHED, REFUSED = "call_accepted", "call_finished", "call_refused"


def fingerprint(argv: list[str], options: Mapping[str, Any]) -> str:
    """Of what a call does, so that a key used again for something else is noticed."""
    text = json.dumps([argv, dict(options)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class Call:
    """What is on record of one key."""

    index: int
    key: str
    handle: str
    fingerprint: str
    incarnation: int
    result: dict[str, Any] | None = None
    lsn: int | None = None


class History:
    """The log of a sandbox that this process drives."""

    def __init__(self, folder: Path, *, take_over: bool = False, is_stale: Callable[[], bool] = lambda: False) -> None:
        self._is_stale = is_stale
        self._journal = Journal(folder, take_over=take_over)
        self.calls: dict[str, Call] = {}
        self.count = 0
        for lsn, record in self._journal.replay():
            if isinstance(record, Event):
                self._apply(lsn, record)

    def _apply(self, lsn: int, event: Event) -> None:
        fields = event.fields
        if event.kind == ACCEPTED:
            call = Call(fields["index"], fields["key"], fields["handle"], fields["fingerprint"], fields["incarnation"])
            self.count = max(self.count, call.index + 1)
            if call.key:
                self.calls[call.key] = call
        elif event.kind in (FINISHED, REFUSED):
            found = self.calls.get(fields["key"])
            if found is not None and event.kind == REFUSED:
                del self.calls[fields["key"]]
            elif found is not None:
                found.result, found.lsn = fields["result"], lsn
        elif event.kind == "rollback":  # what came after the snapshot did not happen: its keys are free again
            self.calls = {key: call for key, call in self.calls.items() if (call.lsn or lsn) <= fields["history_seq"]}

    @property
    def last(self) -> int:
        """Number of the last entry."""
        return self._journal.last_lsn

    def find(self, key: str, print_: str, incarnation: int) -> Call | CommandResult | None:
        """What is known of a key: its result, the call that may still run, or nothing.

        Raises: ReplayDivergence when the key stands for another call; OutcomeUnknown when it began in an incarnation
        that is no more.
        """
        call = self.calls.get(key)
        if call is None:
            return None
        if call.fingerprint != print_:
            raise ReplayDivergence(
                f"call {key!r} is on record for another command (fingerprint {call.fingerprint}, asked now {print_}). "
                "A key names one call for ever; the program that asks has changed, or two calls share a key."
            )
        if call.result is not None:
            return replayed(call.result, call.lsn)
        if call.incarnation != incarnation:
            raise OutcomeUnknown(
                f"call {key!r} began in incarnation {call.incarnation} of this sandbox, which ended before its result "
                f"was recorded; now it is incarnation {incarnation}. Roll back to a snapshot from before it, and ask."
            )
        return call

    async def accept(self, key: str, handle: str, print_: str, incarnation: int, about: dict[str, Any]) -> Call:
        """Write down that a call is about to start; durable when this returns."""
        call = Call(self.count, key, handle, print_, incarnation)
        self.count += 1
        fields = {"index": call.index, "key": key, "handle": handle, "fingerprint": print_, "incarnation": incarnation}
        await self.write(ACCEPTED, {**fields, **about})
        if key:  # only now: what is not on disk must not be taken for begun
            self.calls[key] = call
        return call

    async def refuse(self, call: Call, why: str) -> None:
        """Write down that an accepted call never started."""
        self.calls.pop(call.key, None)
        await self.write(REFUSED, {"key": call.key, "index": call.index, "why": why})

    async def finish(self, call: Call, result: CommandResult) -> int:
        """Write down how a call ended; durable when this returns its number."""
        call.result = packed(result, call.index)
        call.lsn = await self.write(FINISHED, {"key": call.key, "index": call.index, "result": call.result})
        return call.lsn

    async def write(self, kind: str, fields: dict[str, Any], *, durable: bool = True) -> int:
        """Add an entry; returns its number."""
        try:
            lsn = self._journal.append(Event(kind, _storable(fields)))
            if durable:
                await asyncio.to_thread(self._journal.commit)
        except JournalError as error:
            if self._is_stale():
                raise StaleEpoch(
                    f"another process drives this sandbox now; this one may no longer act: {error}"
                ) from error
            raise
        return lsn

    async def rolled_back(self, snapshot: str, history_seq: int) -> None:
        """What came after entry `history_seq` did not happen."""
        fields = {"snapshot": snapshot, "history_seq": history_seq}
        lsn = await self.write("rollback", fields)
        self._apply(lsn, Event("rollback", fields))

    def close(self) -> None:
        """Let another process write."""
        self._journal.close()

    def discard(self) -> None:
        """Let go of a log whose folder is about to be removed, without the cost of sealing it."""
        self._journal.discard()


def _storable(value: Any) -> Any:
    """Text that is no Unicode, such as odd file names, as bytes; the rest as it is."""
    if isinstance(value, dict):
        return {name: _storable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-8", "surrogateescape")
    return value


def packed(result: CommandResult, index: int) -> dict[str, Any]:
    """A result as an entry holds it, byte for byte."""
    return {
        "exit_code": result.exit_code,
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
        "signal": result.signal,
        "timed_out": result.timed_out,
        "oom_killed": result.oom_killed,
        "truncated_bytes": dict(result.truncated_bytes),
        "duration_ms": result.duration_ms,
        "paused_ms": result.paused_ms,
        "call_index": index,
    }


def replayed(fields: dict[str, Any], lsn: int | None) -> CommandResult:
    """The result that `packed` made an entry of."""
    return CommandResult(**fields, replayed=True, journal_seq=lsn)


def read(folder: Path, since: int = 0) -> list[dict[str, Any]]:
    """Entries after number `since` as plain data; any process may look, also while another one writes."""
    if not folder.exists():
        return []
    return [
        {"seq": lsn, "kind": record.kind, **record.fields}
        for lsn, record in replay_folder(folder, since)
        if isinstance(record, Event) and lsn > since
    ]
