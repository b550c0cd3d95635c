"""Rorqual: DeepSeek-V4 models you can train, serve and talk to.

The names below are the public ones. Each is imported at first use, so `import rorqual` is quick and needs no
torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute); an attribute of None means the module itself
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "ModelConfig": ("rorqual.config", "ModelConfig"),
    "Transformer": ("rorqual.model", "Transformer"),
    "load": ("rorqual.checkpoint", "load"),
    "Engine": ("rorqual.engine", "Engine"),
    "SamplingParams": ("rorqual.engine", "SamplingParams"),
    "Journal": ("rorqual.journal", "Journal"),
    "AsyncSandbox": ("rorqual.sandbox", "AsyncSandbox"),
    "Sandbox": ("rorqual.sandbox", "Sandbox"),
    "chat": ("rorqual.chat", None),
    "checkpoint": ("rorqual.checkpoint", None),
}

__all__ = [
    "AsyncSandbox",
    "Engine",
    "Journal",
    "ModelConfig",
    "SamplingParams",
    "Sandbox",
    "Transformer",
    "__version__",
    "chat",
    "checkpoint",
    "load",
]

if TYPE_CHECKING:
    from rorqual import chat as chat
    from rorqual import checkpoint as checkpoint
    from rorqual.checkpoint.load import load as load
    from rorqual.config import ModelConfig as ModelConfig
    from rorqual.engine import Engine as Engine
    from rorqual.engine import SamplingParams as SamplingParams
    from rorqual.journal import Journal as Journal
    from rorqual.model import Transformer as Transformer
    from rorqual.sandbox import AsyncSandbox as AsyncSandbox
    from rorqual.sandbox import Sandbox as Sandbox


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rorqual' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module_name, attribute = _PUBLIC[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
