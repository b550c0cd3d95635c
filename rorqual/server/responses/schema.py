"""The body of POST /responses. Source: DeepSeek's Responses guide; `seed` and `rorqual` are additions.

What only concerns things this server does not do (storing, tiers, caching by key) is taken without effect. What would
change the answer is refused: a history kept by the server, answers in the background, prompts by id.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rorqual.errors import RequestError
from rorqual.server.schema import Body, Extension


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = Field(None, description="No effect: reasoning is given whole.")
    generate_summary: str | None = Field(None, description="No effect.")
    encrypted_content: Any = Field(None, description="No effect.")
    context: Any = Field(None, description="No effect.")


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = Field(None, description="No effect.")
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = Field(None, description="No effect: the answer always obeys the schema.")


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = Field(None, description="No effect.")


class ResponsesRequest(Body):
    """POST /responses."""

    model: str
    input: str | list[Any] | None = None
    instructions: str | None = Field(None, description="Becomes the first system message.")
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    user: str | None = None
    rorqual: Extension | None = Field(None, description="Our own: `priority` and `timeout_s`.")
    include: list[str] | None = Field(None, description="`message.output_text.logprobs` acts; the rest has no effect.")
    previous_response_id: str | None = Field(None, description="Refused: nothing is stored.")
    conversation: Any = Field(None, description="Refused: nothing is stored.")
    prompt: Any = Field(None, description="Refused: nothing is stored.")
    background: bool | None = Field(None, description="Only false.")
    store: bool | None = Field(None, description="No effect: nothing is stored.")
    parallel_tool_calls: bool | None = Field(None, description="No effect: calls may always be parallel.")
    max_tool_calls: int | None = Field(None, description="No effect: the client runs the tools.")
    metadata: dict[str, Any] | None = Field(None, description="No effect.")
    truncation: str | None = Field(None, description="No effect: too long an input is refused.")
    service_tier: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect: equal beginnings are found without one.")
    prompt_cache_retention: str | None = Field(None, description="No effect.")
    context_management: Any = Field(None, description="No effect.")
    client_metadata: Any = Field(None, description="No effect.")
    stream_options: Any = Field(None, description="No effect: usage comes with the last event.")

    @model_validator(mode="after")
    def _supported(self) -> ResponsesRequest:
        if self.input is None and self.instructions is None:
            raise RequestError(
                "Neither input nor instructions is given, so there is nothing to answer. Send one of them.",
                param="input",
            )
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise RequestError(
                    f"{name} refers to something stored, and this server stores nothing between requests. Send the "
                    "whole history in input.",
                    param=name,
                )
        if self.background:
            raise RequestError(
                "background is true, but answers are given on the connection that asks. Leave it out, and stream.",
                param="background",
            )
        return self
