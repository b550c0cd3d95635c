"""OpenAI-style HTTP API and web page over an engine. `create_app` builds the application, `run` serves it."""

from rorqual.server.app import create_app
from rorqual.server.run import run
from rorqual.server.served import ServedModel
from rorqual.server.service import Behaviour

__all__ = ["Behaviour", "ServedModel", "create_app", "run"]
