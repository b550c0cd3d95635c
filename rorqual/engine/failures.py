"""What a caller is told when the engine itself cannot go on."""

from __future__ import annotations

from rorqual.errors import RequestError


def closed() -> RequestError:
    """The engine was closed before the request was done (503)."""
    return RequestError(
        "The engine is closed, so the request cannot run. Start the server again and repeat it.",
        status=503,
        type="server_error",
    )


def failed(error: BaseException) -> RequestError:
    """The model, or the engine, failed while it ran the request (500)."""
    return RequestError(
        f"The model failed while running this request: {type(error).__name__}: {str(error).rstrip('.')}. Nothing more "
        "can be generated for it. Send it again; if it fails again, the full trace is in the server's log.",
        status=500,
        type="server_error",
    )
