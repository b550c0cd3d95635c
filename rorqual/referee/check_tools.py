"""Tool calls: the right tool, arguments its schema takes, ids that tell calls apart, nothing the policy forbids.

What has one plain reading is repaired (`json_text`, `schemas`); a call that passes is not touched, to the byte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rorqual.chat import make_call_id
from rorqual.errors import RequestError
from rorqual.referee.answer import Answer, Asked, Call
from rorqual.referee.json_text import NotJson, dump, read_leniently, read_strictly
from rorqual.referee.policy import Policy
from rorqual.referee.reasons import Finding, failed, repaired
from rorqual.referee.schemas import Schema, fit, schema_of, violations

_WRAPPERS: Final = ("arguments", "parameters", "args", "input", "kwargs", "params", "tool_input", "properties")
_NAMES: Final = ("name", "tool", "function", "tool_name", "function_name", "type", "id", "tool_call_id")
_NAMESPACE = re.compile(r"^(?:functions?|tools?|default_api)[.:/]")


@dataclass
class _State:
    """A call on its way through the check."""

    index: int
    call: Call
    found: list[Finding]

    @property
    def label(self) -> str:
        return f"call {self.index + 1} (`{self.call.name}`)"

    def repair(self, code: str, says: str, **changes: Any) -> None:
        self.call = replace(self.call, **changes)
        self.found.append(repaired(code, f"{self.label}: {says}", call=self.index))

    def fail(self, code: str, says: str) -> None:
        self.found.append(failed(code, f"{self.label}: {says}", call=self.index))


def check_tools(asked: Asked, answer: Answer, policy: Policy) -> tuple[Answer, list[Finding]]:
    """The answer with its calls repaired as far as they can be, and what was found."""
    found: list[Finding] = []
    calls: list[Call] = []
    for index, call in enumerate(answer.calls):
        state = _State(index, call, [])
        _check_call(state, asked, policy, cut=answer.finish == "length")
        if any(one.rejects for one in state.found):  # half a repair helps nobody: it is judged as it was written
            state.call, state.found = call, [one for one in state.found if one.status != "repaired"]
        found += state.found
        calls.append(state.call)
    if answer.had_plain_arguments:
        found.append(repaired("arguments_stringified", "arguments sent as an object were written as JSON text"))
    if answer.is_legacy and not asked.is_legacy:  # the request has `tools`, and clients then look for calls
        answer = replace(answer, is_legacy=False)
    if not answer.is_legacy:
        calls = _distinct_ids(calls, found)
    _check_together(asked, calls, found)
    return (answer if tuple(calls) == answer.calls else answer.with_calls(calls)), found


def _check_call(state: _State, asked: Asked, policy: Policy, *, cut: bool) -> None:
    value = _checked_value(state, asked, policy, cut=cut)
    # also of a call that is broken besides: in annotate it may go out, and its client may read it leniently
    forbidden = policy.forbids(state.call.name or "", state.call.arguments if value is _UNREADABLE else value)
    if forbidden is not None:
        state.fail("side_effect_forbidden", forbidden)


def _checked_value(state: _State, asked: Asked, policy: Policy, *, cut: bool) -> Any:
    """The arguments' value; `_UNREADABLE` where the call is none or they cannot be read."""
    if not state.call.name:
        state.fail("call_malformed", "it has no name, so nobody knows what it calls")
        return _UNREADABLE
    if state.call.kind == "custom":
        if state.call.name in asked.custom:
            state.found.append(failed("not_judged", f"{state.label}: its free text was not looked at"))
        else:
            state.fail("tool_unknown", "there is no custom tool of that name")
        return state.call.arguments
    if not asked.functions:
        state.fail("call_unwanted", "the request has no tools")
        return _plain_value(state.call.arguments)
    name = _known_name(state.call.name, asked.functions, policy)
    if name is None:
        known = ", ".join(f"`{one}`" for one in list(asked.functions)[:40])
        state.fail("tool_unknown", f"there is no tool of that name; the tools are {known}")
        return _plain_value(state.call.arguments)
    if name != state.call.name:
        state.repair("name_alias", f"read as `{name}`", name=name)
    value = _read_arguments(state, cut=cut)
    if value is _UNREADABLE:
        return value
    schema = _schema_of(state, asked.functions[name])
    if schema is not None:
        return _fitted(state, schema, value, policy)
    if not isinstance(value, dict):
        state.fail("arguments_not_object", "the arguments are no object")
    return value


def _plain_value(text: str) -> Any:
    try:
        return read_strictly(text)
    except NotJson:
        return _UNREADABLE


_UNREADABLE: Final = object()


def _read_arguments(state: _State, *, cut: bool) -> Any:
    """The arguments' value; the text is replaced where it was no plain JSON. `_UNREADABLE` when nobody can tell."""
    text = state.call.arguments
    if not text.strip():
        if text != "{}":
            state.repair("arguments_not_json", "empty arguments read as {}", arguments="{}")
        return {}
    try:
        return read_strictly(text)
    except NotJson as error:
        if error.duplicate is not None:
            state.fail("duplicate_key", f"{error}; give it once")
            return _UNREADABLE
        why = str(error)
    if cut:
        state.fail("truncated_call", "it was cut off at the token limit")
        return _UNREADABLE
    try:
        value, notes = read_leniently(text)
    except NotJson as error:
        code = "duplicate_key" if error.duplicate is not None else "arguments_not_json"
        state.fail(code, f"the arguments are no JSON ({error if error.duplicate else why}); write one JSON object")
        return _UNREADABLE
    state.repair("arguments_not_json", "; ".join(notes) or "rewritten as JSON", arguments=dump(value))
    return value


def _schema_of(state: _State, function: Mapping[str, Any]) -> Schema | None:
    parameters = function.get("parameters")
    if parameters is None:
        return None
    try:
        return schema_of(parameters, f"the parameters of {function['name']}")
    except RequestError as error:
        state.fail("tool_schema_unusable", error.message)
        return None


def _fitted(state: _State, schema: Schema, value: Any, policy: Policy) -> Any:
    """The value as the schema takes it, or what it breaks among the findings."""
    if isinstance(value, dict) and schema.accepts(value):
        return value
    value = _unwrapped(state, schema, value, policy)
    if not isinstance(value, dict):
        state.fail("arguments_not_object", "the arguments are no object")
        return value
    new, repairs = fit(schema, value, state.index, policy.argument_aliases(state.call.name or ""))
    if schema.accepts(new):
        if repairs:
            state.call = replace(state.call, arguments=dump(new))
            state.found.extend(replace(one, says=f"{state.label}: {one.says}") for one in repairs)
        return new
    state.found.extend(violations(schema, value, state.index, state.label))
    return value


def _unwrapped(state: _State, schema: Schema, value: Any, policy: Policy) -> Any:
    """Arguments taken out of what was put around them: a JSON string, a list of one, another object."""
    for _ in range(3):
        inner, code, says = value, "", ""
        if isinstance(value, str):
            try:
                inner = read_strictly(value)
            except NotJson:
                try:
                    inner, _notes = read_leniently(value)
                except NotJson:
                    return value
            code, says = "arguments_stringified", "JSON inside a JSON string taken out"
        elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            inner, code, says = value[0], "arguments_wrapped", "taken out of a list of one"
        elif isinstance(value, dict):
            wrapper = _wrapper(value, schema, state.call.name or "")
            if wrapper is None:
                return value
            inner, code, says = value[wrapper], "arguments_wrapped", f"taken out of `{wrapper}`"
        else:
            return value
        if not isinstance(inner, dict | str | list):
            return value
        if isinstance(inner, dict):
            fixed, _ = fit(schema, inner, aliases=policy.argument_aliases(state.call.name or ""))
            if not schema.accepts(fixed) and _wrapper(inner, schema, state.call.name or "") is None:
                return value
        value = inner
        state.repair(code, says, arguments=dump(value))
    return value


def _wrapper(value: Mapping[str, Any], schema: Schema, tool: str) -> str | None:
    """The key of an object that only wraps the arguments."""
    names = (*_WRAPPERS, tool)
    found = [key for key in value if key in names and key not in schema.properties]
    others = [key for key in value if key not in found and key not in _NAMES]
    return found[0] if len(found) == 1 and not others and isinstance(value[found[0]], dict | str) else None


def _known_name(name: str, functions: Mapping[str, Any], policy: Policy) -> str | None:
    """The tool meant: by its name, by an alias of the policy, or as the only one it is but for spelling."""
    if name in functions:
        return name
    alias = policy.aliases.get(name)
    if alias in functions:
        return alias
    plain = _plain(_NAMESPACE.sub("", name.strip()))
    found = [one for one in functions if _plain(one) == plain]
    return found[0] if len(found) == 1 and plain else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-.]+", "", name).casefold()


def _distinct_ids(calls: Sequence[Call], found: list[Finding]) -> list[Call]:
    seen: set[str] = set()
    out = []
    for index, call in enumerate(calls):
        if not call.id or call.id in seen:
            code = "call_id_duplicate" if call.id else "call_id_missing"
            new = make_call_id(index)
            found.append(repaired(code, f"call {index + 1} (`{call.name}`): given the id {new}", call=index))
            call = replace(call, id=new)
        assert call.id is not None
        seen.add(call.id)
        out.append(call)
    return out


def _check_together(asked: Asked, calls: Sequence[Call], found: list[Finding]) -> None:
    """What `tool_choice` and `parallel_tool_calls` ask, and calls that stand there twice."""
    choice = asked.tool_choice
    names = [call.name for call in calls]
    if choice == "none" and calls:
        found.append(failed("call_unwanted", "tool_choice is `none`; answer with text and call nothing"))
    elif choice == "required" and not calls and asked.functions:
        found.append(failed("call_missing", "tool_choice is `required`; call one of the tools"))
    elif isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        wanted = choice["function"].get("name")
        if not calls:
            found.append(failed("call_missing", f"tool_choice asks for a call of `{wanted}`; call it"))
        elif any(name != wanted for name in names):
            found.append(failed("call_unwanted", f"tool_choice asks for `{wanted}` alone"))
    if asked.body.get("parallel_tool_calls") is False and len(calls) > 1:
        found.append(
            failed("calls_parallel", f"there are {len(calls)} calls, and one is allowed; make the first alone")
        )
    for (name, _), times in Counter((call.name, call.arguments) for call in calls).items():
        if times > 1:
            found.append(failed("call_repeated", f"`{name}` is called {times} times with the same arguments"))
