"""OpenAI's Responses API over the same turns as chat completions; nothing is stored between requests."""

from rorqual.server.responses.answer import answer
from rorqual.server.responses.schema import ResponsesRequest

__all__ = ["ResponsesRequest", "answer"]
