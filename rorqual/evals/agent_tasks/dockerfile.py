"""The part of a Dockerfile that can be followed without Docker: where to work, what to copy in, what to run.

FROM names an image; which of ours stands for it is the caller's choice. RUN has no network here, so an instruction that
installs something succeeds only where the image already has it (`apt-get install` of what is there does not ask).
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError
from rorqual.evals.agent_tasks.task import TaskFailed, administer, make_folder, put_in

_IGNORED = {
    "CMD",
    "ENTRYPOINT",
    "EXPOSE",
    "LABEL",
    "MAINTAINER",
    "STOPSIGNAL",
    "HEALTHCHECK",
    "SHELL",
    "VOLUME",
    "USER",
}

_BEFORE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
"""What an image says before its Dockerfile does: `ENV PATH=/more:$PATH` adds to it."""


@dataclass(frozen=True)
class Instruction:
    """One of RUN, COPY or WORKDIR. words: its arguments; cwd and env: as they are at this place."""

    name: str
    words: tuple[str, ...]
    cwd: str
    env: tuple[tuple[str, str], ...]
    line: int


@dataclass
class Dockerfile:
    """What was read. base: of the last FROM; cwd: where commands run afterwards; env: theirs."""

    base: str
    folder: Path
    cwd: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)

    def build(self, sandbox: Any, timeout_s: float) -> None:
        """Follow it in a sandbox. Raises: TaskFailed for an instruction that fails, with its line."""
        for one in self.instructions:
            where = f"{self.folder / 'Dockerfile'}:{one.line}"
            if one.name == "WORKDIR":
                make_folder(sandbox, one.cwd)
            elif one.name == "COPY":
                self._copy(sandbox, one, where)
            else:
                ran = administer(sandbox, one.words[0], cwd=one.cwd, timeout_s=timeout_s, env=one.env)
                if ran.exit_code != 0:
                    raise TaskFailed(
                        f"{where}: RUN ended with {ran.exit_code}: {(ran.stderr or ran.stdout).strip()[-500:]}. It has "
                        "no network here; use --image with what it would install."
                    )

    def _copy(self, sandbox: Any, one: Instruction, where: str) -> None:
        *sources, target = one.words
        into = target if target.startswith("/") else f"{one.cwd.rstrip('/')}/{target}"
        for name in (name.lstrip("/") or "." for name in sources):  # from the task's folder, with a slash or without
            matches = sorted(self.folder.glob(name)) if any(c in name for c in "*?[") else [self.folder / name]
            for source in matches or [self.folder / name]:
                if not source.resolve().is_relative_to(self.folder.resolve()) or not source.exists():
                    raise TaskFailed(f"{where}: COPY of {name}, which is not in the task's folder.")
                is_folder = target.endswith(("/", "/.")) or target == "." or len(sources) > 1 or len(matches) > 1
                inside = f"{into.rstrip('/.') or ''}/{source.name}" if is_folder and source.is_file() else into
                put_in(sandbox, source, inside.rstrip("/") or "/")


def read_dockerfile(path: Path) -> Dockerfile:
    """Read it. Raises: ConfigError for what cannot be followed without Docker, with its line."""
    found = Dockerfile("", path.parent)
    for number, line in _lines(path.read_text(encoding="utf-8")):
        name, _, rest = line.partition(" ")
        name, rest = name.upper(), rest.strip()
        if name == "FROM":
            found.base = next(word for word in rest.split() if not word.startswith("--"))
            found.cwd, found.env, found.instructions = "/", {}, []
        elif name == "WORKDIR":
            target = _expand(rest.strip("\"'"), found.env)
            found.cwd = target if target.startswith("/") else f"{found.cwd.rstrip('/')}/{target}"
            found.instructions.append(_now(found, name, (), number))
        elif name in ("ENV", "ARG"):
            found.env.update(_settings(name, rest, found.env))
        elif name in ("COPY", "ADD"):
            found.instructions.append(_now(found, "COPY", _copied(rest, found.env, f"{path}:{number}"), number))
        elif name == "RUN":
            found.instructions.append(_now(found, name, (_command(rest),), number))
        elif name not in _IGNORED:
            raise ConfigError(
                f"{path}:{number}: {name} cannot be followed without Docker. Build its image and import it."
            )
    if not found.base:
        raise ConfigError(f"{path} has no FROM, so it is no Dockerfile.")
    return found


def _now(found: Dockerfile, name: str, words: tuple[str, ...], line: int) -> Instruction:
    return Instruction(name, words, found.cwd, tuple(found.env.items()), line)


def _lines(text: str) -> list[tuple[int, str]]:
    """Instructions with the number of their first line; comments out, continued lines joined."""
    lines: list[tuple[int, str]] = []
    held, begun = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not held):
            continue
        begun = begun or number
        if line.rstrip().endswith("\\"):
            held += line.rstrip()[:-1] + " "
            continue
        lines.append((begun, (held + line).strip()))
        held, begun = "", 0
    return [*lines, (begun, held.strip())] if held.strip() else lines


def _command(rest: str) -> str:
    """The command line of RUN, in either form; what begins with `[` and is no JSON is the shell's test."""
    try:
        words = json.loads(rest) if rest.startswith("[") else None
    except ValueError:
        words = None
    return shlex.join(map(str, words)) if words else rest


def _settings(name: str, rest: str, env: dict[str, str]) -> dict[str, str]:
    words = shlex.split(rest)
    if name == "ENV" and "=" not in words[0]:  # the old form: one name, and the rest is its value
        return {words[0]: _expand(" ".join(words[1:]), env)}
    pairs = (word.partition("=") for word in words)
    return {key: _expand(value, env) for key, equals, value in pairs if equals}


def _copied(rest: str, env: dict[str, str], where: str) -> tuple[str, ...]:
    words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
    if any(word.startswith("--from") for word in words) or any("://" in word for word in words):
        raise ConfigError(
            f"{where}: a copy from another image or an address needs Docker. Build its image and import it."
        )
    plain = tuple(_expand(word, env) for word in words if not word.startswith("--"))
    if len(plain) < 2:
        raise ConfigError(f"{where}: COPY takes what to copy and where to.")
    return plain


def _expand(text: str, env: dict[str, str]) -> str:
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda m: {**_BEFORE, **env}.get(m[1] or m[2], ""), text)
