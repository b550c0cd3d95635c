"""Anthropic's Messages API over the same turns as chat completions: what Claude Code and the `anthropic` SDK speak."""
