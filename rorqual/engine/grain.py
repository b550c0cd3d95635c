"""The grain of prompts."""

GRAIN = 128
"""Tokens of a page of compressed entries: where a prompt is cut, as far as the step's tokens allow."""
