"""OpenAI-style HTTP API and web page over an engine. `create_app` builds the application, `run` serves it."""

from rorqual.server.app import create_app
from rorqual.server.run import run
from rorqual.server.served import ServedModel

__all__ = ["ServedModel", "create_app", "run"]
