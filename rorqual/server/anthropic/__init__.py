"""Anthropic's Messages API over the same turns as chat completions: what Claude Code and the `anthropic` SDK speak."""

from rorqual.server.anthropic.routes import list_models, make_router

__all__ = ["list_models", "make_router"]
