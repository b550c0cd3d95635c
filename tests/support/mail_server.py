"""A real mail server on loopback that keeps what it is given."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any

from aiosmtpd.controller import Controller


@dataclass
class MailServer:
    """Handler and inbox. refuse: addresses it will not take mail for. delay_s: how long it looks at a content."""

    port: int = 0
    inbox: list[EmailMessage] = field(default_factory=list)
    refuse: tuple[str, ...] = ()
    delay_s: float = 0.0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if address in self.refuse:
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        await asyncio.sleep(self.delay_s)
        message = message_from_bytes(envelope.content, policy=default)
        assert isinstance(message, EmailMessage)
        self.inbox.append(message)
        return "250 taken"

    def ids(self) -> list[str]:
        """The Message-IDs that arrived, in order."""
        return [str(message["Message-ID"]) for message in self.inbox]


@contextmanager
def mail_server() -> Iterator[MailServer]:
    """A server that runs until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    handler = MailServer(port)
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        yield handler
    finally:
        controller.stop()
