"""The mail tool: to addresses that the user named, with files of the sandbox, exactly once (`courier.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from mimetypes import guess_type
from posixpath import basename
from typing import Any

from rorqual.agents.courier import Mail, Server, message_id, send
from rorqual.agents.errors import CallFailed
from rorqual.agents.tools.base import Outcome, Tool, ToolContext, schema
from rorqual.errors import SandboxError

MAX_ATTACHED_BYTES = 20 << 20


def mail_tool(server: Server, sender: str, allowed: Sequence[str]) -> Tool:
    """`send_mail`. allowed: the only addresses it writes to; the first is the user's own.

    The text of a document can talk a model into anything; whom it may write to is therefore not up to the model.
    """

    def run(arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
        to = arguments.get("to") or allowed[0]
        if to not in allowed:
            raise CallFailed(f"mail to {to} is not allowed; it may go to {', '.join(allowed)}")

        def compose() -> Mail:
            return Mail(server, sender, (to,), _compose(arguments, to, sender, context))

        receipt = send(context.outbox, context.key, compose)
        return Outcome.text(f"sent to {to} as {receipt['message_id']}")

    text = {"type": "string"}
    return Tool(
        "send_mail",
        f"Send a mail, with files of the sandbox attached. Without `to` it goes to the user, {allowed[0]}.",
        schema(
            "subject body",
            to={"type": "string", "description": f"One of: {', '.join(allowed)}."},
            subject=text,
            body={"type": "string", "description": "Plain text."},
            attachments={"type": "array", "items": text, "description": "Paths in the sandbox."},
        ),
        "external",
        run,
        external_token=True,
        needs_time=True,
    )


def _compose(arguments: Mapping[str, Any], to: str, sender: str, context: ToolContext) -> bytes:
    """The message's bytes; the same for the same call, however often it is composed."""
    message = EmailMessage(policy=SMTP.clone(cte_type="7bit"))
    try:
        message["From"], message["To"], message["Subject"] = sender, to, arguments["subject"]
    except ValueError as error:  # a line break in the subject
        raise CallFailed(f"the subject cannot be used ({error})") from None
    message["Date"] = format_datetime(datetime.fromtimestamp(int(context.when_s), UTC))
    message["Message-ID"] = message_id(context.key)
    message.set_content(arguments["body"], cte="base64")
    left = MAX_ATTACHED_BYTES
    for path in arguments.get("attachments") or ():
        data = _attachment(path, left, context)
        left -= len(data)
        kind = guess_type(path)[0] or "application/octet-stream"
        maintype, _, subtype = kind.partition("/")
        if maintype in ("multipart", "message"):
            maintype, subtype = "application", "octet-stream"
        name = "".join(c for c in basename(path) if c.isprintable()) or "file"
        message.add_attachment(data, maintype=maintype, subtype=subtype, filename=name)
    if message.is_multipart():
        message.set_boundary(f"=={context.key}==")
    return message.as_bytes()


def _attachment(path: Any, limit: int, context: ToolContext) -> bytes:
    if not isinstance(path, str):
        raise CallFailed(f"attachments must be paths, and one is {type(path).__name__}")
    try:
        return context.environment.read_bytes(context, path, limit)
    except SandboxError as error:
        raise CallFailed(f"{path} cannot be attached: {error}") from None
    except ValueError:
        raise CallFailed(
            f"{path} cannot be attached: all files together may have {MAX_ATTACHED_BYTES:,} bytes"
        ) from None
