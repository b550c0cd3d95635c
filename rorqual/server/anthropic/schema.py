"""The body of POST /anthropic/v1/messages and the blocks it is made of.

Every field that Anthropic's clients send is declared here. What only concerns things this server does not do (tiers,
cache marks, edits of the history) is taken without effect and says so; what would change the answer is refused.
Source: DeepSeek's Anthropic guide and the types of Anthropic's SDK; `min_p`, `seed` and `rorqual` are additions.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from rorqual.server.schema import Body, Extension

TOOL_NAME = r"^[A-Za-z0-9_-]{1,128}$"


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"] = Field(description="`adaptive` is read as `enabled`.")
    budget_tokens: int | None = Field(None, description="No effect: `max_tokens` covers thinking and answer.")
    display: Literal["summarized", "omitted", "updates"] | None = Field(
        None, description="`omitted` leaves thinking blocks empty but for their signature; else thinking comes whole."
    )
    block_binding: Any = Field(None, description="No effect: signatures are not checked.")


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: str | None = None
    format: JsonFormat | None = None
    task_budget: Any = Field(None, description="No effect.")


class Metadata(Body):
    model_config = ConfigDict(extra="ignore", strict=True)

    user_id: str | None = Field(None, description="Whose conversation it is; other keys have no effect.")


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = Field(None, description="No effect: the model decides how many calls.")


class Tool(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="No effect, as on the hosted API.")
    cache_control: Any = Field(None, description="No effect: equal beginnings are found without marks.")
    defer_loading: bool | None = Field(None, description="No effect: every tool is shown at once.")
    eager_input_streaming: bool | None = Field(None, description="No effect: arguments are always streamed.")
    input_examples: Any = Field(None, description="No effect.")
    allowed_callers: Any = Field(None, description="No effect.")


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description="No effect.")
    citations: Any = Field(None, description="No effect.")


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="Not checked.")
    cache_control: Any = Field(None, description="No effect.")


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = Field(None, description="No effect.")
    caller: Any = Field(None, description="No effect.")
    toolset_name: Any = Field(None, description="No effect.")


class ToolReferenceBlock(Body):
    """A tool found by a client's tool search; the model reads its name."""

    type: Literal["tool_reference"]
    tool_name: str
    cache_control: Any = Field(None, description="No effect.")


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] | None = None
    is_error: bool | None = Field(None, description="No effect: the model reads the text.")
    cache_control: Any = Field(None, description="No effect.")
    toolset_name: Any = Field(None, description="No effect.")


def _described(*blocks: type[Body]) -> Any:  # Any: pydantic types it too narrowly
    """For the OpenAPI document only, as blocks are read one by one: a text, or a list of such blocks."""
    items = {"anyOf": [block.model_json_schema() for block in blocks]}
    return {"anyOf": [{"type": "string"}, {"type": "array", "items": items}]}


class InputMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Any] = Field(
        json_schema_extra=_described(TextBlock, ThinkingBlock, ToolUseBlock, ToolResultBlock)
    )


class MessagesRequest(Body):
    """POST /anthropic/v1/messages, and the same for counting tokens, where sampling fields have no effect."""

    model: str
    messages: list[InputMessage]
    system: str | list[Any] | None = Field(None, json_schema_extra=_described(TextBlock))
    max_tokens: int | None = Field(None, description="Lowered to what the context has room for.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: ThinkingConfig | None = Field(None, description="Enabled unless switched off.")
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(None, description="As `output_config.format`, which goes first.")
    metadata: Metadata | None = None
    tools: list[Any] | None = Field(
        None, json_schema_extra={"anyOf": [{"type": "array", "items": Tool.model_json_schema()}, {"type": "null"}]}
    )
    tool_choice: ToolChoice | None = None
    rorqual: Extension | None = Field(None, description="Our own: `priority` and `timeout_s`.")
    thread: Any = Field(None, description="Refused: nothing is stored.")
    context_management: Any = Field(None, description="No effect; the answer says that no edit was applied.")
    compaction: Any = Field(None, description="No effect.")
    cache_control: Any = Field(None, description="No effect: equal beginnings are found without marks.")
    container: Any = Field(None, description="No effect.")
    mcp_servers: Any = Field(None, description="No effect.")
    service_tier: str | None = Field(None, description="No effect.")
    inference_geo: str | None = Field(None, description="No effect.")
    speed: str | None = Field(None, description="No effect.")
    diagnostics: Any = Field(None, description="No effect.")
    fallbacks: Any = Field(None, description="No effect.")
    fallback_credit_token: Any = Field(None, description="No effect.")
    billing_policy: Any = Field(None, description="No effect.")
    betas: Any = Field(None, description="No effect.")
    anthropic_beta: Any = Field(None, description="No effect.")
    anthropic_version: Any = Field(None, description="No effect.")
