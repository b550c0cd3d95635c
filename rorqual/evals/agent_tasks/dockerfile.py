"""The part of a Dockerfile that can be followed without Docker: where to work, what to copy in, what to run.

FROM names an image; which of ours stands for it is the caller's choice. RUN has no network here, so an instruction that
installs something succeeds only where the image already has it (`apt-get install` of what is there does not ask).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
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
    """One of RUN, COPY, WORKDIR, or WRITE (a heredoc's COPY: text, target). cwd and env: as they are at this place."""

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
            elif one.name == "WRITE":
                _write(sandbox, one)
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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    for number, line, heredocs in _lines(text, path):
        name, _, rest = line.partition(" ")
        name, rest, where = name.upper(), rest.strip(), f"{path}:{number}"
        if name == "FROM":
            found.base = next(word for word in rest.split() if not word.startswith("--"))
            found.cwd, found.env, found.instructions = "/", {}, []
        elif name == "WORKDIR":
            target = _expand(rest.strip("\"'"), found.env, where)
            found.cwd = target if target.startswith("/") else f"{found.cwd.rstrip('/')}/{target}"
            found.instructions.append(_now(found, name, (), number))
        elif name in ("ENV", "ARG"):
            found.env.update(_settings(name, rest, found.env, where))
        elif name in ("COPY", "ADD"):
            if heredocs:
                found.instructions.append(_now(found, "WRITE", _written(rest, heredocs, found.env, where), number))
            else:
                found.instructions.append(_now(found, "COPY", _copied(rest, found.env, where), number))
        elif name == "RUN":
            found.instructions.append(_now(found, name, (_command(_without_flags(rest, where), heredocs),), number))
        elif name not in _IGNORED:
            raise ConfigError(
                f"{path}:{number}: {name} cannot be followed without Docker. Build its image and import it."
            )
    if not found.base:
        raise ConfigError(f"{path} has no FROM, so it is no Dockerfile.")
    return found


def _now(found: Dockerfile, name: str, words: tuple[str, ...], line: int) -> Instruction:
    return Instruction(name, words, found.cwd, tuple(found.env.items()), line)


@dataclass(frozen=True)
class _Heredoc:
    """name: its last line. body: what stands before that. expands: whether the builder puts variables in."""

    name: str
    body: str
    expands: bool


_HEREDOC = re.compile(r"(?:(?<=\s)|^)\d*<<(-?)([\"']?)([A-Za-z_][\w.-]*)\2(?=\s|$|[;&|>)])")
_TAKES_HEREDOCS = {"RUN", "COPY", "ADD"}


def _lines(text: str, path: Path) -> list[tuple[int, str, list[_Heredoc]]]:
    """Instructions with the number of their first line; comments out, continued lines joined, heredocs beside them.

    Raises: ConfigError for a heredoc without an end.
    """
    found: list[tuple[int, str, list[_Heredoc]]] = []
    held, begun = "", 0
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.lstrip().startswith("#") or (not line.strip() and not held):
            continue
        begun = begun or number
        if line.rstrip().endswith("\\"):
            held += line.rstrip()[:-1] + " "
            continue
        whole = (held + line).strip()
        heredocs = []
        if whole.partition(" ")[0].upper() in _TAKES_HEREDOCS:
            for match in _HEREDOC.finditer(whole):
                heredocs.append(_read_heredoc(match, lines, f"{path}:{begun}"))
        found.append((begun, whole, heredocs))
        held, begun = "", 0
    return [*found, (begun, held.strip(), [])] if held.strip() else found


def _read_heredoc(match: re.Match[str], lines: Iterator[tuple[int, str]], where: str) -> _Heredoc:
    strips, quote, name = match[1] == "-", match[2], match[3]
    body: list[str] = []
    for _, line in lines:
        line = line.lstrip("\t") if strips else line
        if line == name:
            return _Heredoc(name, "".join(f"{one}\n" for one in body), not quote)
        body.append(line)
    raise ConfigError(f"{where}: the heredoc {name} has no end: a line with that word alone.")


def _without_flags(rest: str, where: str) -> str:
    """RUN without its flags. Raises: ConfigError for one that brings something in from elsewhere."""
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        rest = rest.strip()
        name, _, value = flag.partition("=")
        kind = dict(part.partition("=")[::2] for part in value.split(",")).get("type", "bind")
        harmless = kind in ("cache", "tmpfs") if name == "--mount" else name == "--network"
        if not harmless:  # a cache is empty at first and no part of the image; there is no network anyway
            raise ConfigError(f"{where}: RUN {flag} cannot be followed without Docker. Build its image and import it.")
    return rest


def _command(rest: str, heredocs: Sequence[_Heredoc] = ()) -> str:
    """The command line of RUN, in either form; what begins with `[` and is no JSON is the shell's test."""
    if heredocs:
        return _with_heredocs(rest, heredocs)
    try:
        words = json.loads(rest) if rest.startswith("[") else None
    except ValueError:
        words = None
    return shlex.join(map(str, words)) if words else rest


def _with_heredocs(rest: str, heredocs: Sequence[_Heredoc]) -> str:
    """A heredoc alone is a script; beside a command it is the shell's own. `<<-` has lost its tabs already."""
    first = heredocs[0]
    if len(heredocs) == 1 and _HEREDOC.fullmatch(rest):
        if not first.body.startswith("#!"):
            return first.body
        mark = f"{first.name}_END"
        return f'f=$(mktemp) && cat > "$f" <<\'{mark}\' && chmod +x "$f" && "$f"\n{first.body}{mark}\n'
    return rest + "\n" + "".join(f"{one.body}{one.name}\n" for one in heredocs)


def _written(rest: str, heredocs: Sequence[_Heredoc], env: dict[str, str], where: str) -> tuple[str, ...]:
    """The text and the target of a COPY from a heredoc. Raises: ConfigError for several, or files beside it."""
    words = [word for word in shlex.split(_HEREDOC.sub(" ", rest)) if not word.startswith("--")]
    if len(heredocs) != 1 or len(words) != 1 or words[0].endswith("/"):
        raise ConfigError(f"{where}: a COPY of a heredoc takes one heredoc and the name of one file here.")
    body = _expand(heredocs[0].body, env, where) if heredocs[0].expands else heredocs[0].body
    return body, _expand(words[0], env, where)


def _write(sandbox: Any, one: Instruction) -> None:
    text, target = one.words
    into = target if target.startswith("/") else f"{one.cwd.rstrip('/')}/{target}"
    folder = into.rsplit("/", 1)[0]
    if folder:
        make_folder(sandbox, folder)
    sandbox.files.write(into, text.encode())


def _settings(name: str, rest: str, env: dict[str, str], where: str) -> dict[str, str]:
    words = [word.replace("\0", "\\$") for word in shlex.split(rest.replace("\\$", "\0"))]  # `\$` is no variable
    if name == "ENV" and "=" not in words[0]:  # the old form: one name, and the rest is its value
        return {words[0]: _expand(" ".join(words[1:]), env, where)}
    pairs = (word.partition("=") for word in words)
    return {key: _expand(value, env, where) for key, equals, value in pairs if equals}


def _copied(rest: str, env: dict[str, str], where: str) -> tuple[str, ...]:
    words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
    if any(word.startswith("--from") for word in words) or any("://" in word for word in words):
        raise ConfigError(
            f"{where}: a copy from another image or an address needs Docker. Build its image and import it."
        )
    plain = tuple(_expand(word, env, where) for word in words if not word.startswith("--"))
    if len(plain) < 2:
        raise ConfigError(f"{where}: COPY takes what to copy and where to.")
    return plain


_VARIABLE = re.compile(
    r"(?P<escaped>\\\$)|\$(?:(?P<bare>\w+)|\{(?P<name>\w+)(?:(?P<how>:?[-+])(?P<word>(?:[^{}]|\$\{[^{}]*\})*))?\})|(?P<odd>\$\{)"
)


def _expand(text: str, env: dict[str, str], where: str) -> str:
    """`$V`, `${V}`, `${V:-word}`, `${V:+word}` and both without the colon. Raises: ConfigError for any other form."""
    known = {**_BEFORE, **env}

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        if match["odd"]:
            raise ConfigError(f"{where}: {text[match.start() :][:40]} is a form of variables that is not known here.")
        got, how = known.get(match["bare"] or match["name"]), match["how"]
        if how is None:
            return got or ""
        is_set = bool(got) if how.startswith(":") else got is not None
        if how.endswith("-"):
            return str(got) if is_set else _expand(match["word"], env, where)
        return _expand(match["word"], env, where) if is_set else ""

    return _VARIABLE.sub(value, text)
