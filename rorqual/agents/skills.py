"""Skill folders: written conventions that a model reads when it needs them, not before.

A skill is a folder with a `SKILL.md`: front matter between two lines `---` with `name` and `description`, then free
text. The system prompt lists names and descriptions only; a tool gives the full text and the folder's other files.
Source: the published convention of agent skills. Left out: running a skill's scripts here; they go into the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError

FILE = "SKILL.md"
MAX_FILE_BYTES = 256 * 1024
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)(.*)\Z", re.DOTALL)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


@dataclass(frozen=True)
class Skill:
    """One skill. text: what follows the front matter. files: the folder's other files, relative, sorted."""

    name: str
    description: str
    text: str
    folder: Path
    files: tuple[str, ...]

    def read(self, file: str) -> bytes:
        """A file of the folder's list. Raises: KeyError for any other name."""
        if file not in self.files:
            raise KeyError(file)
        return (self.folder / file).read_bytes()


def find_skills(folders: Sequence[Path]) -> dict[str, Skill]:
    """Every skill of these folders, which are skills themselves or hold some, by name in order of the name.

    Raises: ConfigError for a folder without skills, a broken SKILL.md, or one name in two places.
    """
    found: dict[str, Skill] = {}
    for folder in folders:
        places = [folder] if (folder / FILE).is_file() else sorted(p.parent for p in folder.glob(f"*/{FILE}"))
        if not places:
            raise ConfigError(f"{folder} holds no skill: neither it nor a folder in it has a {FILE}. Check --skills.")
        for place in places:
            skill = read_skill(place)
            if skill.name in found:
                raise ConfigError(
                    f"the skill {skill.name!r} is in {found[skill.name].folder} and in {place}, so it is unclear "
                    "which one is meant. Rename one."
                )
            found[skill.name] = skill
    return dict(sorted(found.items()))


def read_skill(folder: Path) -> Skill:
    """The skill in a folder. Raises: ConfigError naming the file and what it lacks."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}). A skill is UTF-8 text.") from None
    match = _FRONT.match(text)
    fields = _front_matter(match[1]) if match else {}
    for name in ("name", "description"):
        if not fields.get(name):
            raise ConfigError(
                f"{path} has no `{name}` in its front matter, without which the model is not told of it. Begin the "
                "file with: ---, name: ..., description: ..., ---."
            )
    if not _NAME.fullmatch(fields["name"]):
        raise ConfigError(f"{path} has the name {fields['name']!r}. Use small letters, digits and hyphens, 64 at most.")
    assert match is not None
    return Skill(fields["name"], fields["description"], match[2].strip() + "\n", folder, _files(folder))


def listing(skills: dict[str, Skill]) -> str:
    """The lines of the system prompt."""
    if not skills:
        return ""
    lines = [f"- {skill.name}: {skill.description}" for skill in skills.values()]
    return (
        "# Skills\n\nWritten conventions for some kinds of work. When a task is of such a kind, read the skill with "
        "the tool `read_skill` before you begin, and follow it.\n\n" + "\n".join(lines)
    )


def _front_matter(text: str) -> dict[str, str]:
    """`key: value` lines; a value goes on over indented lines, and may be quoted: what skills use of YAML."""
    fields: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        if line[:1] in (" ", "\t") and key:
            joined = f"{fields[key]} {line.strip()}"
            fields[key] = joined.strip()
        elif ":" in line and not line.lstrip().startswith("#"):
            key, _, value = line.partition(":")
            key = key.strip()
            value = value.strip()
            fields[key] = "" if value in (">", "|", ">-", "|-") else value
    return {name: _unquoted(value) for name, value in fields.items()}


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'" else value


def _files(folder: Path) -> tuple[str, ...]:
    """Regular files beside SKILL.md that are small enough to hand on; links that lead out are left out."""
    root = folder.resolve()
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.resolve().is_relative_to(root)
        if inside and path.is_file() and path.name != FILE and path.stat().st_size <= MAX_FILE_BYTES:
            found.append(path.relative_to(folder).as_posix())
    return tuple(found)
