"""Delivers one mail exactly once: a small process of its own, which outlives the run that sent it.

The run writes the mail into its outbox and starts the courier for the mail's key; both may be killed at any moment.
Files of the outbox, all named by the key:

    KEY.mail      what to send and where, written whole before anything else
    KEY.lock      held while a courier is at work; the kernel lets go of it when the courier dies
    KEY.started   durable before the content goes over the wire, once the server asked for it
    KEY.done      durable after the server took it
    KEY.refused   the server (or the lack of one) said no, so nothing was delivered

A courier that finds `done` or `refused` does nothing. One that holds the lock and finds `started` without either knows
that an earlier courier died in the only moment whose outcome cannot be told: it does nothing, and the run ends as
INFRA_FAILED with that as evidence. It never sends twice. Until the server has asked for the content (354) nothing is
accepted: a connection that ends before is tried once more, and then it is a refusal. The Message-ID is made from the
key, so that a mail server that has seen it can tell. Source: docs/agents.md. Left out: queues and retries over hours,
which are a mail server's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import smtplib
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.agents.errors import AgentError, CallFailed, InfraFailed

TIMEOUT_S = 60.0
ATTEMPTS = 2
"""How often a mail is offered, where the connection ends before the server asked for the content."""
GO_ON = 354
PASSWORD = "RORQUAL_SMTP_PASSWORD"
"""Environment variable with the password of the mail server's user; it is never written anywhere."""


@dataclass(frozen=True)
class Server:
    """Where mail is handed in. security: none, starttls, tls. user: logs in with RORQUAL_SMTP_PASSWORD."""

    host: str
    port: int
    user: str | None = None
    security: str = "none"


@dataclass(frozen=True)
class Mail:
    """A finished message and its envelope."""

    server: Server
    sender: str
    recipients: tuple[str, ...]
    content: bytes


@dataclass(frozen=True)
class Outbox:
    """The files of one mail."""

    folder: Path
    key: str

    def path(self, state: str) -> Path:
        """`KEY.state`."""
        return self.folder / f"{self.key}.{state}"

    def write(self, state: str, fields: dict[str, Any]) -> None:
        """Whole or not at all, and durable on return."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = self.path(f"{state}.{secrets.token_hex(4)}")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path(state))
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, state: str) -> dict[str, Any] | None:
        """What was written, or None."""
        try:
            found = json.loads(self.path(state).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found if isinstance(found, dict) else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The only one at work on this mail; waits for another to end."""
        descriptor = os.open(self.path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def send(folder: Path, key: str, compose: Callable[[], Mail]) -> dict[str, Any]:
    """Deliver a mail as `key`, if no earlier call did; returns the server's receipt.

    compose: makes the mail; called only when the outbox has none of this key, since what it was made of may be gone.
    Raises: CallFailed when it was refused and nothing was delivered; InfraFailed when nobody can know; what `compose`
    raises, and then nothing was sent.
    """
    outbox = Outbox(folder, key)
    if outbox.read("mail") is None:
        outbox.write("mail", _fields(compose()))
    command = [sys.executable, "-m", "rorqual.agents.courier", str(folder), key]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it must not die with us
        cwd="/",
        env=_environment(),
    )
    process.wait()
    return receipt(outbox, process.returncode)


def receipt(outbox: Outbox, code: int = 0) -> dict[str, Any]:
    """What the outbox says once no courier is at work. Raises: as `send`."""
    done, refused, started = outbox.read("done"), outbox.read("refused"), outbox.read("started")
    if done is not None:
        return done
    if refused is not None:
        raise CallFailed(f"the mail was not sent: {refused['reason']}")
    if started is not None:
        raise InfraFailed(
            f"the mail {outbox.key} was being handed to the server when its courier died, so it may have arrived or "
            "not. It is not sent again. Ask the recipient whether the mail with this Message-ID came: "
            f"{started['message_id']}.",
            {"key": outbox.key, "outcome": "unknown", **started},
        )
    raise AgentError(
        f"the courier of mail {outbox.key} ended with code {code} before it began, so nothing was sent. "
        f"Look at {outbox.folder}, then go on with --resume."
    )


def message_id(key: str) -> str:
    """The Message-ID of the mail with this key."""
    return f"<{key}@agents.rorqual>"


def deliver(folder: Path, key: str) -> int:
    """The courier itself: 0 once the outcome is on file, 3 when an earlier courier left an unknown one."""
    outbox = Outbox(folder, key)
    with outbox.locked():
        if outbox.read("done") is not None or outbox.read("refused") is not None:
            return 0
        if outbox.read("started") is not None:
            return 3
        fields = outbox.read("mail")
        if fields is None:
            return 4
        _hand_over(outbox, _mail(fields))
    return 0


def _hand_over(outbox: Outbox, mail: Mail) -> None:
    """Try it, and once more where the server broke off before it asked for the content: nothing was accepted then."""
    for attempt in range(ATTEMPTS):
        try:
            _try(outbox, mail)
            return
        except _BrokeOff as error:
            if attempt + 1 == ATTEMPTS:
                why = f"the mail server broke off before the content, {ATTEMPTS} times ({error})"
                outbox.write("refused", {"reason": why})


def _try(outbox: Outbox, mail: Mail) -> None:
    try:
        connection = _connect(mail.server)
    except smtplib.SMTPServerDisconnected as error:
        raise _BrokeOff(str(error)) from error
    except (OSError, smtplib.SMTPException) as error:
        outbox.write("refused", {"reason": f"no mail server at {mail.server.host}:{mail.server.port} ({error})"})
        return
    with contextlib.closing(connection):
        refusal = _offer(connection, mail)
        if refusal is not None:
            outbox.write("refused", {"reason": refusal})
            return
        evidence = {"message_id": message_id(outbox.key), "to": list(mail.recipients), "server": mail.server.host}
        outbox.write("started", evidence)
        # from here to the answer nobody can know; an exception leaves `started` alone on file, and says so
        connection.send(_as_sent(mail.content))
        code, answer = connection.getreply()
        reply = f"{code} {answer.decode('utf-8', 'replace')}"
        if _is_yes(code):
            outbox.write("done", {**evidence, "reply": reply})
        else:
            outbox.write("refused", {"reason": f"the mail server refused the content: {reply}"})
        with contextlib.suppress(smtplib.SMTPException, OSError):
            connection.quit()


class _BrokeOff(Exception):
    """The connection ended before the server asked for the content."""


def _connect(server: Server) -> smtplib.SMTP:
    if server.security == "tls":
        context = ssl.create_default_context()
        connection: smtplib.SMTP = smtplib.SMTP_SSL(server.host, server.port, timeout=TIMEOUT_S, context=context)
    else:
        connection = smtplib.SMTP(server.host, server.port, timeout=TIMEOUT_S)
    connection.ehlo_or_helo_if_needed()
    if server.security == "starttls":
        connection.starttls(context=ssl.create_default_context())
        connection.ehlo()
    if server.user is not None:
        connection.login(server.user, os.environ.get(PASSWORD, ""))
    return connection


def _offer(connection: smtplib.SMTP, mail: Mail) -> str | None:
    """Name sender and recipients until the server asks for the content (354); returns why it will not have it.

    Nothing is sent to some and not others. Raises: _BrokeOff.
    """
    try:
        code, answer = connection.mail(mail.sender)
        if not _is_yes(code):
            return f"the mail server refused the sender {mail.sender}: {code} {answer.decode('utf-8', 'replace')}"
        for recipient in mail.recipients:
            code, answer = connection.rcpt(recipient)
            if not _is_yes(code):
                return f"the mail server refused {recipient}: {code} {answer.decode('utf-8', 'replace')}"
        code, answer = connection.docmd("data")
        if code != GO_ON:
            return f"the mail server refused the content: {code} {answer.decode('utf-8', 'replace')}"
    except (OSError, smtplib.SMTPException) as error:
        raise _BrokeOff(str(error)) from error
    except ValueError as error:  # a line break, or letters that this server takes in no address
        return f"the address {mail.sender} or one of {', '.join(mail.recipients)} cannot be used ({error})"
    return None


def _as_sent(content: bytes) -> bytes:
    """With its end, and a dot before each line that begins with one (RFC 5321, section 4.5.2)."""
    return re.sub(rb"(?m)^\.", b"..", content) + (b"" if content.endswith(b"\r\n") else b"\r\n") + b".\r\n"


def _is_yes(code: int) -> bool:
    return code // 100 == 2


def _fields(mail: Mail) -> dict[str, Any]:
    server = mail.server
    return {
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "security": server.security,
        "sender": mail.sender,
        "recipients": list(mail.recipients),
        "content": mail.content.decode("ascii"),
    }


def _mail(fields: dict[str, Any]) -> Mail:
    server = Server(fields["host"], fields["port"], fields["user"], fields["security"])
    return Mail(server, fields["sender"], tuple(fields["recipients"]), fields["content"].encode("ascii"))


def _environment() -> dict[str, str]:
    """What the courier needs of ours: where Python finds this package, and the password."""
    kept = ("PATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR", PASSWORD)
    found = {name: os.environ[name] for name in kept if name in os.environ}
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**found, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


if __name__ == "__main__":
    sys.exit(deliver(Path(sys.argv[1]), sys.argv[2]))
