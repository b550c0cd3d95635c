"""Agents: a model, tools in a sandbox, and a journal that makes a run survive anything.

`run_agent` runs a folder's task to its end, or goes on with it; `Session` is what other loops are written on, and
`converse` is the loop itself. Names are imported at first use, since a mail's courier needs none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "AgentError": "errors",
    "CallFailed": "errors",
    "InfraFailed": "errors",
    "Preempted": "errors",
    "Environment": "environment",
    "EnvironmentSettings": "environment",
    "Observer": "observer",
    "RunFolder": "runs",
    "RunHooks": "run",
    "RunSettings": "settings",
    "Session": "session",
    "SessionParts": "session",
    "Tool": "tools",
    "ToolBox": "tools",
    "TrajectoryLog": "log",
    "converse": "loop",
    "create_run": "runs",
    "find_run": "runs",
    "run_agent": "run",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from rorqual.agents.environment import Environment as Environment
    from rorqual.agents.environment import EnvironmentSettings as EnvironmentSettings
    from rorqual.agents.errors import AgentError as AgentError
    from rorqual.agents.errors import CallFailed as CallFailed
    from rorqual.agents.errors import InfraFailed as InfraFailed
    from rorqual.agents.errors import Preempted as Preempted
    from rorqual.agents.log import TrajectoryLog as TrajectoryLog
    from rorqual.agents.loop import converse as converse
    from rorqual.agents.observer import Observer as Observer
    from rorqual.agents.run import RunHooks as RunHooks
    from rorqual.agents.run import run_agent as run_agent
    from rorqual.agents.runs import RunFolder as RunFolder
    from rorqual.agents.runs import create_run as create_run
    from rorqual.agents.runs import find_run as find_run
    from rorqual.agents.session import Session as Session
    from rorqual.agents.session import SessionParts as SessionParts
    from rorqual.agents.settings import RunSettings as RunSettings
    from rorqual.agents.tools import Tool as Tool
    from rorqual.agents.tools import ToolBox as ToolBox


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rorqual.agents' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"rorqual.agents.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
