"""`read_skill`: the full text of a skill, or one of its files copied into the sandbox, when the model asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rorqual.agents.errors import CallFailed
from rorqual.agents.skills import Skill
from rorqual.agents.tools.base import Outcome, Tool, ToolContext, schema

FOLDER = "skills"
"""Where files of skills go in the sandbox's working folder."""


def skill_tool(skills: Mapping[str, Skill]) -> Tool:
    """The tool over these skills."""

    def run(arguments: Mapping[str, Any], context: ToolContext) -> Outcome:
        name, file = arguments["name"], arguments.get("file")
        skill = skills.get(name)
        if skill is None:
            raise CallFailed(f"there is no skill {name!r}; there are {', '.join(skills)}")
        if file is None:
            more = f"\n\n[Files beside it, readable with `file`: {', '.join(skill.files)}]" if skill.files else ""
            return Outcome.text(skill.text + more)
        try:
            data = skill.read(file)
        except KeyError:
            raise CallFailed(
                f"the skill {name} has no file {file!r}; it has {', '.join(skill.files) or 'none'}"
            ) from None
        path = f"{FOLDER}/{name}/{file}"
        context.environment.put(context, path, data)
        try:
            shown = data.decode("utf-8")
        except UnicodeDecodeError:
            shown = f"({len(data):,} bytes that are no text)"
        return Outcome.text(f"[also in the sandbox as {path}]\n{shown}")

    return Tool(
        "read_skill",
        "Read the conventions of a skill by its name, or one of its files, which is then in the sandbox too.",
        schema(
            "name",
            name={"type": "string", "enum": list(skills), "description": "Which skill."},
            file={"type": "string", "description": "A file beside its text, as listed there."},
        ),
        "rerun",
        run,
    )
