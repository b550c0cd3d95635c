"""What a chat request's reply is held to: a forced call, strict tools, JSON."""

from __future__ import annotations

from rorqual import chat
from rorqual.engine import Grammar
from rorqual.errors import RequestError
from rorqual.server.messages import ChatPrompt
from rorqual.server.schema import ChatRequest
from rorqual.server.tools import forced_call
from rorqual.tokenizer.special import END_THINK


def grammar_for(body: ChatRequest, prompt: ChatPrompt, *, forces_thinking: bool) -> Grammar | None:
    """The grammar of the reply; None where anything goes.

    forces_thinking: whether a call can be forced in thinking mode, too.
    Raises: RequestError for what cannot be asked of this request, or a schema that nothing can be held to.
    """
    forced = forced_call(body.tool_choice, prompt.tools)
    if forced and prompt.thinking and not forces_thinking:
        raise RequestError(
            "Thinking mode does not support this tool_choice. Switch thinking off, or send `auto`.", param="tool_choice"
        )
    schema = None
    form = body.response_format
    if form is not None and form.type == "json_object":
        if not any("json" in message["content"].lower() for message in prompt.messages):
            raise RequestError(
                "Prompt must contain the word 'json' in some form to use 'response_format' of type 'json_object'.",
                param="response_format",
            )
        schema = {"type": "object"}
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError(
                "response_format.json_schema is missing: it holds the schema. Add it.", param="response_format"
            )
        schema = form.json_schema.schema_
    text = chat.reply_grammar(prompt.tools, forced=forced, schema=schema)
    if text is None:
        return None
    param = "tools" if schema is None else "response_format"
    return Grammar(text, END_THINK if prompt.opens_reasoning else None, param)
