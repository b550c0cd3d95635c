"""One line for every request, and the trace id that ties lines to answers. No text of a prompt or an answer is logged.

Lines go to the logger `rorqual.requests` at level INFO, so nothing is written until somebody asks for it: `configure`
does for the command line. The id stands in the answer's headers, in its line, and in the line of every error that
happened on the way.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from rorqual import log

Style = Literal["text", "json", "off"]

TRACE_HEADERS = ("x-ds-trace-id", "x-request-id", "request-id")
"""DeepSeek's, and those in which the SDKs of OpenAI and Anthropic look for it."""
trace: ContextVar[str] = ContextVar("trace", default="")
requests = log.get("rorqual.requests")
_OURS = "rorqual_request_log"  # by which `configure` knows its own handlers again


def write(fields: Mapping[str, Any]) -> None:
    """Log one request."""
    if requests.isEnabledFor(logging.INFO):
        requests.info("request", extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: a request's fields, or level, logger and message of any other record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        if fields is not None:
            line.update(fields)
        else:
            line.update(logger=record.name, message=record.getMessage())
            if trace.get():
                line["trace"] = trace.get()
            if record.exc_info:
                line["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """The same for people: fields that say something, as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        said = " ".join(f"{name}={_word(value)}" for name, value in fields.items() if value not in (None, "", False))
        return f"{_time(record)} {said}"


def configure(style: Style, stream: TextIO | None = None) -> None:
    """Write request lines to `stream` (stderr); `json` also turns warnings of everything into JSON lines."""
    root = logging.getLogger()
    for logger in (requests, root):
        for handler in [handler for handler in logger.handlers if handler.get_name() == _OURS]:
            logger.removeHandler(handler)
    requests.setLevel(logging.NOTSET if style == "off" else logging.INFO)
    requests.propagate = style != "text"
    if style == "off":
        return
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.set_name(_OURS)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    (root if style == "json" else requests).addHandler(handler)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: Any) -> str:
    """A value that no text in it can make look like two."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = text.isascii() and text.isprintable() and not set(text) & {" ", "=", '"'}
    return text if plain else json.dumps(text)
