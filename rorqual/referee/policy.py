"""What the referee was told to hold answers to: profiles, forbidden side effects, other names of tools; 8.2's options.

A policy file is TOML:

    profile = "assistant"
    [aliases]                          # other names of tools
    search_web = "web_search"
    [argument_aliases.read_file]       # other names of a tool's arguments
    file = "path"
    [[forbid]]                         # calls that never go out
    tool = "delete_*"
    because = "nothing is deleted here"
    [[forbid]]
    tool = "shell"
    argument = "command"
    matches = '\\brm\\s+-rf\\b'
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rorqual.errors import ConfigError, RequestError

Mode = Literal["off", "observe", "annotate", "enforce"]
Streaming = Literal["buffer", "holdback", "annotate_after"]
CheckName = Literal["schema", "tool", "claims", "citations", "copy", "code", "arith", "abstain", "done", "format"]


DEFAULT: Final = ("schema", "tool", "format", "copy", "arith", "abstain")


@dataclass(frozen=True)
class Profile:
    """How careful to be.

    loss_ratio: how much worse a wrong answer is than a right one is good; answers with p at or below
    loss_ratio / (1 + loss_ratio) are not given. copy: `near` rejects identifiers that are almost one of the context's,
    and those nobody makes up (UUIDs, hashes); `strict` every identifier in arguments that the context does not have.
    citations: whether a wrong quotation or a missing one rejects an answer. claims: whether a statement that the
    sources do not have is marked, or removed. votes: how often the judge is asked of a claim, 1 (2 in doubt) or 3.
    """

    name: str
    loss_ratio: float
    copy: Literal["near", "strict"] = "near"
    citations: Literal["soft", "hard"] = "soft"
    claims: Literal["mark", "remove"] = "mark"
    votes: int = 1

    @property
    def threshold(self) -> float:
        return self.loss_ratio / (1 + self.loss_ratio)


PROFILES: Final = {
    "chat": Profile("chat", 1.0),
    "assistant": Profile("assistant", 3.0),
    "regulated": Profile("regulated", 9.0, copy="strict", citations="hard", claims="remove", votes=3),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Forbid(_Strict):
    """A call that never goes out: the tool's name with `*`, and what an argument of it must match to be meant."""

    tool: str
    argument: str | None = None
    matches: str | None = None
    because: str | None = None


class PolicyFile(_Strict):
    """The policy file, and the custom profile of a request (`loss_ratio`, `copy`, `citations`, `claims`, `votes`)."""

    profile: Literal["chat", "assistant", "regulated"] = "assistant"
    loss_ratio: float | None = Field(None, gt=0)
    copy_: Literal["near", "strict"] | None = Field(None, alias="copy")
    citations: Literal["soft", "hard"] | None = None
    claims: Literal["mark", "remove"] | None = None
    votes: Literal[1, 3] | None = None
    aliases: dict[str, str] = Field(default_factory=dict)
    argument_aliases: dict[str, dict[str, str]] = Field(default_factory=dict)
    forbid: list[Forbid] = Field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """Everything an answer is held to besides its own request."""

    profile: Profile = PROFILES["assistant"]
    aliases: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    forbid: tuple[Forbid, ...] = ()

    @cached_property
    def id(self) -> str:
        """A name that changes whenever the policy does."""
        parts: list[Any] = [asdict(self.profile), dict(self.aliases), {k: dict(v) for k, v in self.arguments.items()}]
        parts.append([one.model_dump() for one in self.forbid])
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return f"{self.profile.name}-{digest[:10]}"

    def argument_aliases(self, tool: str) -> Mapping[str, str]:
        return self.arguments.get(tool, {})

    def forbids(self, tool: str, arguments: Any) -> str | None:
        """Why this call may not go out; None when it may. arguments: their text where nobody can read it.

        Such a text is searched as a whole by a rule for one argument, and any rule without `matches` is held to apply.
        """
        for rule in self.forbid:
            if not fnmatchcase(tool, rule.tool):
                continue
            if rule.matches is not None:
                value = (
                    arguments
                    if rule.argument is None or isinstance(arguments, str)
                    else _member(arguments, rule.argument)
                )
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                if value is None or re.search(rule.matches, text) is None:
                    continue
            elif (
                rule.argument is not None
                and not isinstance(arguments, str)
                and _member(arguments, rule.argument) is None
            ):
                continue
            return f"the policy forbids it ({rule.because or f'rule `{rule.tool}`'})"
        return None

    def with_profile(self, given: str | Mapping[str, Any] | None) -> Policy:
        """The policy under a request's profile. Raises: RequestError for one that is none."""
        if given is None:
            return self
        if isinstance(given, str):
            if given not in PROFILES:
                raise RequestError(
                    f"referee.profile is {given!r}; use one of {', '.join(PROFILES)}, or an object.",
                    param="referee.profile",
                )
            return replace(self, profile=PROFILES[given])
        custom = _parsed(given, "referee.profile")
        if isinstance(custom, str):
            raise RequestError(custom, param="referee.profile")
        if any(rule.matches is not None for rule in custom.forbid):
            raise RequestError(
                "referee.profile.forbid has `matches`: regular expressions are taken from the server's policy file "
                "only. Name tools and arguments.",
                param="referee.profile",
            )
        made = _policy(custom, "custom")
        # a request may forbid more, never less
        return replace(
            made,
            aliases={**self.aliases, **made.aliases},
            arguments={**self.arguments, **made.arguments},
            forbid=(*self.forbid, *made.forbid),
        )


def load_policy(path: Path | None, profile: str | None = None) -> Policy:
    """The policy of a file, under another profile where one is named. Raises: ConfigError."""
    data: Mapping[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the policy {path} cannot be read: {error}. Give a TOML file.") from error
    if profile is not None:
        data = {**data, "profile": profile}
    parsed = _parsed(data, str(path or "--profile"))
    if isinstance(parsed, str):
        raise ConfigError(parsed)
    return _policy(parsed, parsed.profile)


def _parsed(data: Mapping[str, Any], where: str) -> PolicyFile | str:
    """The file's contents, or what is wrong with them."""
    try:
        parsed = PolicyFile.model_validate(dict(data))
        for rule in parsed.forbid:
            re.compile(rule.matches or "")
    except ValidationError as error:
        first = error.errors()[0]
        return f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}. docs/referee.md has the fields."
    except re.error as error:
        return f"{where}: forbid.matches is no regular expression ({error}). Correct it."
    return parsed


def _policy(parsed: PolicyFile, name: str) -> Policy:
    base = PROFILES[parsed.profile]
    profile = Profile(
        name,
        parsed.loss_ratio or base.loss_ratio,
        parsed.copy_ or base.copy,
        parsed.citations or base.citations,
        parsed.claims or base.claims,
        parsed.votes or base.votes,
    )
    profile = base if profile == replace(base, name=name) and name in PROFILES else profile
    return Policy(profile, parsed.aliases, parsed.argument_aliases, tuple(parsed.forbid))


def _member(value: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


class EvidenceBody(_Strict):
    """A text that answers are to rest on."""

    id: str
    text: str | None = None
    uri: str | None = None
    spans: list[tuple[int, int]] | None = None


class BudgetBody(_Strict):
    """Bounds of what the referee may spend on one request beyond its first answer."""

    max_rounds: int = Field(2, ge=0, le=8)
    token_ratio: float = Field(0.5, ge=0, le=100)
    wall_ms: float = Field(20_000, ge=0)


class RefereeBody(_Strict):
    """The `referee` object of a chat request."""

    mode: Literal["off", "annotate", "enforce"] | None = None
    profile: str | dict[str, Any] | None = None
    checks: list[CheckName] | None = None
    budget: BudgetBody | None = None
    evidence: list[EvidenceBody] | None = None
    pins: list[tuple[int, int]] | None = None
    tests: str | None = Field(None, max_length=65536)
    stream: Streaming | None = None


@dataclass(frozen=True)
class Evidence:
    """A text given for an answer to rest on."""

    id: str
    text: str


@dataclass(frozen=True)
class Options:
    """How one request is judged. stream: None until a stream asks (`streaming`).

    tests: Python that code in the answer has to pass. runs_code: whether the server runs code at all.
    """

    mode: Mode
    policy: Policy
    checks: tuple[str, ...] = DEFAULT
    budget: BudgetBody = field(default_factory=lambda: BudgetBody.model_validate({}))
    evidence: tuple[Evidence, ...] = ()
    stream: Streaming | None = None
    tests: str | None = None
    runs_code: bool = False

    @property
    def streaming(self) -> Streaming:
        """How a stream is sent: checked first where answers may be rejected, live and told after it otherwise.

        Claims and code are judged of the whole answer, so where they may reject it nothing goes out before.
        """
        if self.mode == "enforce" and not {"claims", "code"}.isdisjoint(self.checks):
            return "buffer"
        return self.stream or ("buffer" if self.mode == "enforce" else "annotate_after")


def options_of(given: Any, default: Options) -> Options:
    """The request's `referee` object over the server's defaults.

    Raises: RequestError for a field or value that is none, and for what nothing here can act on.
    """
    if given is None:
        return default
    try:
        # lists stand for pairs in JSON
        body = RefereeBody.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise _refusal(error) from None
    if body.pins:
        raise RequestError(
            "referee.pins names positions for the retrieval guard of an engine, and this upstream takes none. Leave it "
            "out.",
            param="referee.pins",
        )
    if "code" in (body.checks or ()) and not default.runs_code:
        raise RequestError(
            "referee.checks holds code, and this server runs none. Leave it out, or have the server started with "
            "--run-code.",
            param="referee.checks",
        )
    evidence = []
    for i, one in enumerate(body.evidence or ()):
        if one.text is None:
            raise RequestError(
                f"referee.evidence[{i}] has no text: nothing is fetched from here. Send the text itself.",
                param=f"referee.evidence[{i}]",
            )
        spans = one.spans or [(0, len(one.text))]
        evidence.append(Evidence(one.id, "\n".join(one.text[start:end] for start, end in spans)))
    mode = body.mode or default.mode
    if default.mode == "enforce" and mode != "enforce":
        raise RequestError(
            f"referee.mode is `{mode}`, and this referee enforces for everybody. Leave the mode out.",
            param="referee.mode",
        )
    if body.stream == "annotate_after" and mode == "enforce":
        raise RequestError(
            "referee.stream is `annotate_after`, which sends an answer before it is checked, and the mode is enforce. "
            "Use buffer or holdback, or mode annotate.",
            param="referee.stream",
        )
    checks = tuple(body.checks) if body.checks is not None else default.checks
    if default.mode == "enforce":  # a request may ask for more than its operator, not for less
        checks = (*default.checks, *(check for check in checks if check not in default.checks))
    if body.checks is None and evidence and "citations" not in checks:
        checks = (*checks, "citations")
    if body.tests is not None and "code" not in checks:
        raise RequestError(
            "referee.tests is for code in the answer, and referee.checks has no `code`. Add it.", param="referee.tests"
        )
    policy = default.policy.with_profile(body.profile)
    if default.mode == "enforce":
        policy = replace(policy, profile=_stricter(policy.profile, default.policy.profile))
    return Options(
        mode, policy, checks, body.budget or default.budget, tuple(evidence),
        body.stream or default.stream, body.tests, default.runs_code,
    )  # fmt: skip


def _stricter(asked: Profile, own: Profile) -> Profile:
    """The profile asked for, no less careful than the operator's anywhere."""
    made = replace(
        asked,
        loss_ratio=max(asked.loss_ratio, own.loss_ratio),
        copy="strict" if "strict" in (asked.copy, own.copy) else "near",
        citations="hard" if "hard" in (asked.citations, own.citations) else "soft",
        claims="remove" if "remove" in (asked.claims, own.claims) else "mark",
        votes=max(asked.votes, own.votes),
    )
    return own if replace(made, name=own.name) == own else made


def _refusal(error: ValidationError) -> RequestError:
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(["referee", *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        return RequestError(
            f"Unknown field `{where}`: this server refuses what it would not act on. Remove it from the request.",
            param=where,
            code="unknown_field",
        )
    return RequestError(f"{where}: {first['msg']} (got {str(first.get('input'))[:80]!r}).", param=where)
