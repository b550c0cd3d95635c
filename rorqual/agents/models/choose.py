"""From a run's settings to its model."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rorqual.agents.models.base import Backend
from rorqual.agents.models.script import ScriptBackend, load_script
from rorqual.agents.settings import RunSettings
from rorqual.agents.tools.base import ToolBox
from rorqual.tokenizer import Tokenizer

KEY = "RORQUAL_MODEL_KEY"
"""Environment variable with the key of a model server; it is never written anywhere."""

BUNDLED = Path(__file__).parents[2] / "assets" / "minke"


def open_backend(settings: RunSettings, toolbox: ToolBox) -> Backend:
    """A script, a server, or a checkpoint in this process. Raises: ConfigError, CheckpointError, MissingExtraError."""
    if settings.script is not None:
        replies = load_script(Path(settings.script))
        tokenizer = Tokenizer.from_folder(BUNDLED)
        return ScriptBackend(replies, tokenizer, thinking=settings.thinking, pace_s=settings.pace_s)
    if settings.model.startswith(("http://", "https://")):
        from rorqual.agents.models.chat_api import ChatBackend

        return ChatBackend(
            settings.model, Tokenizer.from_folder(BUNDLED), toolbox.schemas(), model=settings.model_name,
            key=os.environ.get(KEY) or None, temperature=settings.temperature,
        )  # fmt: skip
    return _engine(settings)


def _engine(settings: RunSettings) -> Backend:
    from rorqual.agents.models.engine import EngineBackend
    from rorqual.checkpoint import load
    from rorqual.engine import CacheSettings, EngineSettings, SamplingParams

    network, tokenizer = load(settings.model)
    stack = contextlib.ExitStack()
    # the prefix cache lets the next turn begin behind what the last one read
    engine = stack.enter_context(EngineSettings(max_running=1, cache=CacheSettings()).open(network, tokenizer))
    params = SamplingParams(temperature=settings.temperature)
    return EngineBackend(engine, settings.model, params, thinking=settings.thinking, on_close=stack.close)
