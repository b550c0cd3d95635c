"""What can go wrong with a sandbox, in two families that are never mixed.

`CommandError` is the program's fault: it ended badly or ran out of time. `SandboxError` (ours, from `rorqual.errors`)
and its subclasses mean that the platform could not do what it was asked, and nothing is known against the program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rorqual.errors import RorqualError, SandboxError

if TYPE_CHECKING:
    from rorqual.sandbox.spec import CommandResult


class _Travels:
    """Errors with a field beside the message cross process borders (pickle would call them with the message alone)."""

    _second: str

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (str(self), getattr(self, self._second))


class CommandError(_Travels, RorqualError):
    """A command ended with an exit code other than 0, by a signal or at its time limit; `result` has its output."""

    _second = "result"

    def __init__(self, message: str, result: CommandResult) -> None:
        super().__init__(message)
        self.result = result


class Gone(_Travels, SandboxError):
    """The sandbox ended; `reason` says why (closed, idle, lifetime, crashed, never existed)."""

    _second = "reason"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class CapacityRejected(_Travels, SandboxError):
    """No room now; try again in `retry_after_s` seconds."""

    _second = "retry_after_s"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PolicyRejected(SandboxError):
    """What was asked is against a rule: a path outside, a device node, an archive that explodes, a host not allowed."""


class Unsupported(_Travels, SandboxError):
    """The driver cannot do this; `capability` names what it lacks."""

    _second = "capability"

    def __init__(self, message: str, capability: str) -> None:
        super().__init__(message)
        self.capability = capability


class OutcomeUnknown(SandboxError):
    """A call began and nobody knows how it ended. It is not run again on the same files: roll back first."""


class ReplayDivergence(SandboxError):
    """A resumed trajectory asked for another call than the one on record at this place."""


class StaleEpoch(SandboxError):
    """Another process drives this sandbox now; this one may only look."""


class SnapshotFailed(SandboxError):
    """A snapshot could not be made durable; the one before it still stands."""


class TransportError(_Travels, SandboxError):
    """The channel to the sandbox broke; `retryable` says whether the same call may be sent again."""

    _second = "retryable"

    def __init__(self, message: str, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class FileError(SandboxError, OSError):
    """A file inside the sandbox cannot be used as asked; `errno` and `filename` are set as in OSError."""

    def __init__(self, number: int, text: str, path: str) -> None:
        OSError.__init__(self, number, text, path)
