"""The courier: one mail a key, whatever is killed, and a plain word when nobody can know."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mail_server import MailServer, mail_server

from rorqual.agents.courier import Mail, Outbox, Server, deliver, message_id, send
from rorqual.agents.errors import CallFailed, InfraFailed
from rorqual.agents.settings import RunSettings
from rorqual.errors import ConfigError

KEY = "0123456789abcdef0123456789abcdef"
CONTENT = b"From: a@example.org\r\nTo: b@example.org\r\nMessage-ID: <x@y>\r\n\r\nHello.\r\n"


@pytest.fixture
def server() -> Iterator[MailServer]:
    with mail_server() as found:
        yield found


def mail(port: int) -> Mail:
    return Mail(Server("127.0.0.1", port), "a@example.org", ("b@example.org",), CONTENT)


def test_a_mail_goes_out_once_however_often_it_is_sent(server: MailServer, tmp_path: Path) -> None:
    receipts = [send(tmp_path, KEY, lambda: mail(server.port)) for _ in range(2)]
    assert receipts[0] == receipts[1] and receipts[0]["message_id"] == message_id(KEY)
    assert len(server.inbox) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".mail", ".lock", ".started", ".done"}


def test_many_senders_at_once_are_one(server: MailServer, tmp_path: Path) -> None:
    server.delay_s = 0.5
    with ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(lambda _: send(tmp_path, KEY, lambda: mail(server.port)), range(4)))
    assert len(server.inbox) == 1 and receipts == receipts[:1] * 4


def test_a_refusal_is_the_callers_and_final(server: MailServer, tmp_path: Path) -> None:
    server.refuse = ("b@example.org",)
    for _ in range(2):
        with pytest.raises(CallFailed, match="refused b@example.org: 550 no such user"):
            send(tmp_path, KEY, lambda: mail(server.port))
        server.refuse = ()  # it is still the same call, whose answer is known
    assert server.inbox == [] and not (tmp_path / f"{KEY}.started").exists()


def test_no_mail_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(CallFailed, match=f"no mail server at 127.0.0.1:{port}"):
        send(tmp_path, KEY, lambda: mail(port))


class Silent:
    """A mail server that takes the content and never says what became of it; or says what it is told to."""

    def __init__(self, to_data: bytes = b"354 go on", to_content: bytes | None = None) -> None:
        self._to_data, self._to_content = to_data, to_content
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.contents: list[bytes] = []
        self.hung = threading.Event()
        self._connections: list[Any] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: Any) -> None:
        file = connection.makefile("rwb")

        def say(text: bytes) -> None:
            file.write(text + b"\r\n")
            file.flush()

        say(b"220 here")
        for line in file:
            if line.upper().startswith(b"DATA"):
                say(self._to_data)
                if not self._to_data.startswith(b"3"):
                    continue
                content = b""
                while not content.endswith(b"\r\n.\r\n"):
                    content += file.readline()
                self.contents.append(content)
                if self._to_content is None:
                    self.hung.set()
                    return
                say(self._to_content)
                continue
            say(b"250 fine")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._listener.close()


def test_a_courier_killed_in_the_wrong_moment_is_never_followed_by_another(tmp_path: Path) -> None:
    silent = Silent()
    try:
        fields = {
            "host": "127.0.0.1", "port": silent.port, "user": None, "security": "none", "sender": "a@example.org",
            "recipients": ["b@example.org"], "content": CONTENT.decode(),
        }  # fmt: skip
        Outbox(tmp_path, KEY).write("mail", fields)
        courier = subprocess.Popen([sys.executable, "-m", "rorqual.agents.courier", str(tmp_path), KEY])
        assert silent.hung.wait(30)
        os.kill(courier.pid, signal.SIGKILL)
        courier.wait()
        for _ in range(2):
            with pytest.raises(InfraFailed, match="may have arrived or not") as failed:
                send(tmp_path, KEY, lambda: mail(silent.port))
            assert failed.value.evidence["message_id"] == message_id(KEY)
        assert deliver(tmp_path, KEY) == 3
        assert len(silent.contents) == 1
    finally:
        silent.close()


def test_a_refused_content_is_a_refusal_and_not_unknown(tmp_path: Path) -> None:
    server = Silent(b"554 not from you")
    try:
        with pytest.raises(CallFailed, match="refused the content: 554 not from you"):
            send(tmp_path, KEY, lambda: mail(server.port))
        assert server.contents == []
    finally:
        server.close()


class Cutting:
    """A mail server that ends the connection where it is told to, the first `times` times."""

    STAGES = ("connect", "EHLO", "MAIL", "RCPT", "DATA", "content")

    def __init__(self, stage: str, times: int) -> None:
        self._stage, self._left = stage, times
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.offers = 0
        self.contents: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.offers += 1
            with connection, connection.makefile("rwb") as file:
                self._talk(file)

    def _cuts(self, stage: str) -> bool:
        if stage == self._stage and self._left:
            self._left -= 1
            return True
        return False

    def _talk(self, file: Any) -> None:
        if self._cuts("connect"):
            return
        answer = b"220 here"
        while True:
            file.write(answer + b"\r\n")
            file.flush()
            line = file.readline()
            word = line[:4].decode().upper()
            if not line or self._cuts(word):
                return
            answer = b"250 fine"
            if word == "DATA":
                file.write(b"354 go on\r\n")
                file.flush()
                content = b""
                while not content.endswith(b"\r\n.\r\n"):
                    content += file.readline()
                self.contents.append(content)
                if self._cuts("content"):
                    return

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("stage", Cutting.STAGES[:-1])
def test_a_server_that_breaks_off_before_it_asked_is_tried_once_more(tmp_path: Path, stage: str) -> None:
    server = Cutting(stage, times=1)
    try:
        outbox = Outbox(tmp_path, KEY)
        assert send(tmp_path, KEY, lambda: mail(server.port))["reply"] == "250 fine"
        assert server.offers == 2 and len(server.contents) == 1 and outbox.read("refused") is None
    finally:
        server.close()


@pytest.mark.parametrize("stage", Cutting.STAGES[:-1])
def test_a_server_that_breaks_off_again_was_sent_nothing(tmp_path: Path, stage: str) -> None:
    server = Cutting(stage, times=3)
    try:
        for _ in range(2):  # the second call is answered from the file
            with pytest.raises(CallFailed, match="broke off before the content, 2 times"):
                send(tmp_path, KEY, lambda: mail(server.port))
        assert server.offers == 2 and server.contents == [] and not (tmp_path / f"{KEY}.started").exists()
    finally:
        server.close()


def test_a_server_that_breaks_off_after_the_content_is_never_asked_again(tmp_path: Path) -> None:
    server = Cutting("content", times=1)
    try:
        for _ in range(2):
            with pytest.raises(InfraFailed, match="may have arrived or not"):
                send(tmp_path, KEY, lambda: mail(server.port))
        assert server.offers == 1 and len(server.contents) == 1
    finally:
        server.close()


def test_lines_that_begin_with_a_dot_arrive_as_they_are(server: MailServer, tmp_path: Path) -> None:
    content = CONTENT + b".\r\n..two\r\nlast"
    send(tmp_path, KEY, lambda: Mail(Server("127.0.0.1", server.port), "a@example.org", ("b@example.org",), content))
    assert server.inbox[0].get_content() == "Hello.\r\n.\r\n..two\r\nlast\r\n"


def test_every_yes_of_a_server_is_one(tmp_path: Path) -> None:
    server = Silent(to_content=b"251 will forward")
    try:
        assert send(tmp_path, KEY, lambda: mail(server.port))["reply"] == "251 will forward"
    finally:
        server.close()


def test_an_address_that_cannot_be_said_is_a_refusal(server: MailServer, tmp_path: Path) -> None:
    odd = Mail(Server("127.0.0.1", server.port), "a@example.org", ("bj\xf6rn@example.org",), CONTENT)
    with pytest.raises(CallFailed, match="bj\xf6rn@example.org cannot be used"):
        send(tmp_path, KEY, lambda: odd)
    with pytest.raises(ConfigError, match="plain ASCII"):
        RunSettings("Write.", smtp="127.0.0.1:25", mail_to=odd.recipients).check()


def test_a_courier_outlives_who_sent_it(server: MailServer, tmp_path: Path) -> None:
    """The sender is killed with its whole group as soon as the courier runs."""
    server.delay_s = 0.3
    code = (
        "import sys, json\nfrom pathlib import Path\nfrom rorqual.agents.courier import *\n"
        f"send(Path({str(tmp_path)!r}), {KEY!r}, lambda: Mail(Server('127.0.0.1', {server.port}), 'a@example.org',"
        f" ('b@example.org',), {CONTENT!r}))"
    )
    sender = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    end = time.monotonic() + 30
    while not (tmp_path / f"{KEY}.lock").exists():
        assert time.monotonic() < end
        time.sleep(0.002)
    os.killpg(sender.pid, signal.SIGKILL)
    sender.wait()
    while not (tmp_path / f"{KEY}.done").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    receipt = send(tmp_path, KEY, lambda: mail(server.port))
    assert receipt["reply"].startswith("250") and len(server.inbox) == 1


def test_what_is_on_file_has_no_password(server: MailServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_SMTP_PASSWORD", "s3cret")
    monkeypatch.setenv("ANOTHER_SECRET", "token")
    send(tmp_path, KEY, lambda: mail(server.port))
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"s3cret" not in everything and json.loads((tmp_path / f"{KEY}.mail").read_text())["user"] is None


def test_the_courier_needs_no_torch_and_no_tokenizer() -> None:
    code = (
        "import rorqual.agents.courier, sys; print([m for m in ('torch', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
