"""Every error a user or a file can cause, in one tree.

    RorqualError
    ├── ConfigError        a model or run configuration that cannot work
    ├── CheckpointError    files that are missing, damaged or of another shape
    ├── CacheError         a sequence state asked for something it does not hold
    ├── DataError          a corpus or dataset that cannot be read or used
    ├── JournalError       a write-ahead log that is damaged, taken by another writer, or cannot write (segment, offset)
    ├── RequestError       a request to the engine or server (carries an HTTP status)
    ├── SandboxError       a sandbox that cannot be made or used
    └── MissingExtraError  an optional package is not installed

A message has three parts: what happened, with values; why it cannot go on; what to do.
`assert` is kept for our own mistakes.
"""


class RorqualError(Exception):
    """Base of everything Rorqual raises on purpose."""


class ConfigError(RorqualError, ValueError):
    """A model or run configuration that cannot work."""


class CheckpointError(RorqualError):
    """A checkpoint that is missing, damaged, or does not fit the configuration."""


class CacheError(RorqualError):
    """A sequence state was asked for something it no longer (or never) held."""


class DataError(RorqualError):
    """A corpus or dataset that cannot be read or used."""


class JournalError(RorqualError):
    """A write-ahead log that is damaged, written by somebody else, or cannot be written.

    Attributes: `segment` (name of the file at fault) and `offset` (byte in it) where a place in a file is meant.
    `retryable`: nothing is lost and the same call may succeed later (a full disk that was given room).
    """

    def __init__(
        self, message: str, *, segment: str | None = None, offset: int | None = None, retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.segment = segment
        self.offset = offset
        self.retryable = retryable


class RequestError(RorqualError):
    """A request that the engine or server refuses.

    Attributes: `status` (HTTP), `type`, `param` (the field at fault) and `code`, as in the error body of the
    OpenAI-style APIs (`{"error": {"message", "type", "param", "code"}}`). `retry_after_s`: when it is worth asking
    again, where that is known.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code if code is not None else type
        self.retry_after_s = retry_after_s


class SandboxError(RorqualError):
    """A sandbox that cannot be made, reached or used."""


class MissingExtraError(RorqualError, ImportError):
    """An optional package is absent; the message names the extra that brings it."""
