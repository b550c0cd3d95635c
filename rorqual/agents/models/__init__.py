"""Where a turn's tokens come from: an engine in this process, any OpenAI-compatible server, or a recorded script."""

from rorqual.agents.models.base import Backend, Batch, Identity, Turn
from rorqual.agents.models.script import ScriptBackend, load_script

__all__ = ["Backend", "Batch", "Identity", "ScriptBackend", "Turn", "load_script"]
