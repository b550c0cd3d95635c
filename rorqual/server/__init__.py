"""OpenAI-style HTTP API and web page over an engine. `create_app` builds the application, `run` serves it.

Each name is imported at first use: the gateway needs no engine, and so no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Behaviour": "rorqual.server.service",
    "ServedModel": "rorqual.server.served",
    "create_app": "rorqual.server.app",
    "run": "rorqual.server.run",
}

__all__ = ["Behaviour", "ServedModel", "create_app", "run"]

if TYPE_CHECKING:
    from rorqual.server.app import create_app as create_app
    from rorqual.server.run import run as run
    from rorqual.server.served import ServedModel as ServedModel
    from rorqual.server.service import Behaviour as Behaviour


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rorqual.server' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
