"""Request bodies, as DeepSeek documents them. Anything else is refused by name; what has no effect says so.

`null` means absent, for unknown fields too, because SDKs send back whole messages full of nulls. Ranges
that the engine checks (temperature, stop, ...) are left to it. Source: DeepSeek's API documentation;
`top_k`, `min_p`, `seed` and `max_completion_tokens` are additions.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rorqual.errors import RequestError
from rorqual.server import tools
from rorqual.server.described import CONTENT, PINS, STOP, TOOLS, within

MAX_OUTPUT = 393_216
USER_ID = re.compile(r"[A-Za-z0-9_-]{1,512}")


class Body(BaseModel):
    """Base of all bodies: strict types, no unknown fields, null as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown_nulls(cls, data: Any) -> Any:  # Any: whatever JSON holds
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name in cls.model_fields}


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"] = Field(description="`adaptive` is read as `enabled`.")


class StreamOptions(Body):
    include_usage: bool | None = None


class Extension(Body):
    """What this server takes beyond the API, in the body's `rorqual` object."""

    priority: int | None = Field(None, ge=-100, le=100, description="Higher goes first; 0 unless given.")
    timeout_s: float | None = Field(None, description="Seconds after which the answer ends with what it has.")
    guard: str | None = Field(
        None, description="The retrieval guard: off, default, or names of sources; as the server has it unless given."
    )
    pin: list[Any] | None = Field(
        None,
        description="What the guard always shows: spans [begin, end] of prompt tokens, or texts that the prompt holds.",
        json_schema_extra=PINS,
    )

    @field_validator("pin")
    @classmethod
    def _pin(cls, value: list[Any] | None) -> list[Any] | None:
        for number, pin in enumerate(value or ()):
            is_span = isinstance(pin, list) and len(pin) == 2 and all(type(one) is int for one in pin)
            if not is_span and not (isinstance(pin, str) and pin):
                raise RequestError(
                    f"rorqual.pin[{number}] is no span [begin, end] of prompt tokens and no text. Send one of them.",
                    param=f"rorqual.pin[{number}]",
                )
        return value


class JsonSchema(Body):
    name: str | None = Field(None, description="No effect.")
    description: str | None = Field(None, description="No effect.")
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = Field(None, description="No effect: the answer always obeys the schema.")


class ResponseFormat(Body):
    """`json_schema` is an addition: the hosted API takes it on /responses only."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class PastFunction(Body):
    name: str
    arguments: str


class PastCall(Body):
    """A tool call of an earlier assistant message, as this server returned it."""

    id: str
    type: Literal["function"]
    function: PastFunction
    index: int | None = None


class Message(Body):
    role: Literal["system", "user", "assistant", "tool", "latest_reminder", "developer"]
    content: Any = Field(None, description="A string, or a list of text parts.", json_schema_extra=CONTENT)
    name: str | None = Field(None, description="No effect: the prompt format has no place for it.")
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="As `reasoning_content`, which goes first; some clients' name.")
    refusal: str | None = Field(None, description="No effect on a message with content; else the content.")
    annotations: Any = Field(None, description="No effect.")
    audio: Any = Field(None, description="No effect.")
    reasoning_details: Any = Field(None, description="No effect.")
    thinking_blocks: Any = Field(None, description="No effect.")
    provider_specific_fields: Any = Field(None, description="No effect.")
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None


class Sampling(Body):
    """What chat and completions share."""

    model: str
    max_tokens: int | None = Field(None, json_schema_extra=within(1, MAX_OUTPUT))
    temperature: float | None = Field(
        None, description="0 to 2; honoured in thinking mode too.", json_schema_extra=within(0, 2)
    )
    top_p: float | None = Field(None, description="Above 0, up to 1.", json_schema_extra=within(0, 1))
    top_k: int | None = Field(None, json_schema_extra=within(1))
    min_p: float | None = Field(None, json_schema_extra=within(0, 1))
    seed: int | None = Field(None, json_schema_extra=within(0, 2**63 - 1))
    stop: Any = Field(None, description="A string or up to 16 of them.", json_schema_extra=STOP)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, description="Deprecated, no effect; checked to be in -2 to 2.")
    frequency_penalty: float | None = Field(None, description="Deprecated, no effect; checked to be in -2 to 2.")
    n: int | None = Field(None, description="Only 1.")
    user: str | None = Field(None, description="As `user_id`, with any characters.")
    user_id: str | None = Field(None, description="Your end user: each has a cache of its own.")
    rorqual: Extension | None = Field(None, description="Our own: `priority`, `timeout_s` and `guard`.")

    @property
    def owner(self) -> str:
        """The caller's end user, who shares neither cache nor remembered reasoning with others."""
        return self.user_id or self.user or ""

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _penalty(cls, value: float | None, info: Any) -> float | None:
        if value is not None and not -2 <= value <= 2:
            name = info.field_name
            raise RequestError(f"Invalid {name} value, the valid range of {name} is [-2, 2]", param=name)
        return value

    @field_validator("user_id")
    @classmethod
    def _user_id(cls, value: str | None) -> str | None:
        if value is not None and not USER_ID.fullmatch(value):
            raise RequestError("Invalid user_id value: use up to 512 letters, digits, `-` and `_`.", param="user_id")
        return value

    @model_validator(mode="after")
    def _together(self) -> Sampling:
        if self.n not in (None, 1):
            raise RequestError(
                f"n is {self.n}, but this server gives one choice a request. Send n=1, or several requests.",
                param="n",
            )
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is only meaningful for a stream. Set stream to true or leave it out.",
                param="stream_options",
            )
        return self


class ChatRequest(Sampling):
    """POST /chat/completions."""

    tool_name: ClassVar[re.Pattern[str]] = tools.NAME
    max_tools: ClassVar[int | None] = tools.MAX_TOOLS

    messages: list[Message]
    max_completion_tokens: int | None = Field(None, description="Another name of max_tokens.")
    thinking: Thinking | None = Field(None, description="Enabled unless switched off.")
    reasoning_effort: str | None = None
    tools: list[Any] | None = Field(None, json_schema_extra=TOOLS)
    tool_choice: Any = Field(None, description="`none`, `auto`, `required` or a tool.")
    parallel_tool_calls: bool | None = Field(None, description="Calls may always be parallel; only true.")
    metadata: Any = Field(None, description="No effect.")
    store: bool | None = Field(None, description="No effect: nothing is stored.")
    service_tier: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect: equal beginnings are found without one.")
    prompt_cache_retention: str | None = Field(None, description="No effect.")
    verbosity: str | None = Field(None, description="No effect.")
    modalities: list[Literal["text"]] | None = None
    prediction: Any = Field(None, description="No effect: the server drafts by itself.")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, json_schema_extra=within(0, 20))

    @model_validator(mode="after")
    def _supported(self) -> ChatRequest:
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise RequestError(
                "max_tokens and max_completion_tokens are two names of one field. Send one of them.",
                param="max_completion_tokens",
            )
        if self.parallel_tool_calls is False:
            raise RequestError(
                "parallel_tool_calls cannot be switched off: the model decides how many calls a turn has. "
                "Leave it out.",
                param="parallel_tool_calls",
            )
        tools.check_tools(self.tools or [], self.tool_name, self.max_tools)
        tools.forced_call(self.tool_choice, self.tools or [])
        return self


class CompletionRequest(Sampling):
    """POST /beta/completions: text before a gap, perhaps text after it."""

    prompt: str | list[int] = Field(description="Text, or token ids.")
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, description="How many of the likeliest tokens to report, 0 to 20.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value: Any) -> Any:  # Any: whatever JSON holds
        if not isinstance(value, str) and not (isinstance(value, list) and all(type(one) is int for one in value)):
            raise RequestError("prompt is neither a string nor a list of token ids. Send one of them.", param="prompt")
        return value
