"""What a run is: the task and everything that decides it, kept beside its journal so that a resume needs no options."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rorqual.agents.courier import Server
from rorqual.agents.errors import AgentError
from rorqual.errors import ConfigError

_ADDRESS = re.compile(r"[ -~]+@[ -~]+")


@dataclass(frozen=True)
class RunSettings:
    """One run.

    model: bundled name, checkpoint folder, Hub id, or the address of an OpenAI-compatible server. script: a file of
    recorded replies instead of a model; pace_s: seconds between its tokens. kind, sandbox: of the sandbox, and
    further arguments of `Sandbox.create`. files: folder that goes in; out: folder for what comes out. skills: folders
    of skills. mcp: a file of MCP servers. smtp: HOST:PORT of the mail server; mail_to: whom mail may go to. briefing:
    the system message in place of the usual one.
    """

    task: str
    model: str = "minke"
    model_name: str | None = None
    script: str | None = None
    pace_s: float = 0.0
    thinking: bool = True
    temperature: float = 1.0
    seed: int = 0
    max_turns: int = 50
    turn_tokens: int = 8192
    total_tokens: int = 131_072
    kind: str = "container"
    sandbox: dict[str, Any] = field(default_factory=dict)
    files: str | None = None
    out: str | None = None
    skills: tuple[str, ...] = ()
    mcp: str | None = None
    smtp: str | None = None
    smtp_user: str | None = None
    smtp_security: str = "none"
    mail_from: str | None = None
    mail_to: tuple[str, ...] = ()
    briefing: str | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError for what cannot work anywhere."""
        if not self.task.strip():
            raise ConfigError("the task is empty, so there is nothing to do. Say what is to be done.")
        for name, count in (("turns", self.max_turns), ("tokens", min(self.turn_tokens, self.total_tokens))):
            if count < 1:
                raise ConfigError(f"the run may have {count} {name}, so it would end before it began. Give 1 or more.")
        if (self.smtp is None) != (not self.mail_to):
            raise ConfigError("mail needs both --smtp HOST:PORT and --mail-to ADDRESS. Give both, or neither.")
        self.mail_server()

    def check(self) -> None:
        """Look at what a new run needs on this machine. A run that exists is read without: that may be gone by then.

        Raises: ConfigError for what is not there or cannot be used.
        """
        for name, value in (("--files", self.files), *(("--skills", skill) for skill in self.skills)):
            if value is not None and not Path(value).is_dir():
                raise ConfigError(f"{name} {value} is no folder. Check the path.")
        for name, value in (("--script", self.script), ("--mcp", self.mcp)):
            if value is not None and not Path(value).is_file():
                raise ConfigError(f"{name} {value} is no file. Check the path.")
        if self.out is not None and not _is_writable(Path(self.out)):
            raise ConfigError(f"--out {self.out} cannot be written to. Choose another folder.")
        for address in (*self.mail_to, *([] if self.mail_from is None else [self.mail_from])):
            if not _ADDRESS.fullmatch(address):
                raise ConfigError(f"mail cannot go to or come from {address!r}. Give NAME@HOST in plain ASCII.")

    def mail_server(self) -> Server | None:
        """The mail server, where there is one. Raises: ConfigError for no HOST:PORT."""
        if self.smtp is None:
            return None
        host, _, port = self.smtp.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--smtp is {self.smtp!r}. Give HOST:PORT, such as smtp.example.org:587.")
        return Server(host, int(port), self.smtp_user, self.smtp_security)

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> RunSettings:
        """Read them back. Raises: AgentError when the file is none of ours."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            for name in ("skills", "mail_to"):
                fields[name] = tuple(fields[name])
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise AgentError(f"{path} holds no settings of a run ({type(error).__name__}: {error}).") from None


def _is_writable(folder: Path) -> bool:
    """Whether it is a folder to write to, or could be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
