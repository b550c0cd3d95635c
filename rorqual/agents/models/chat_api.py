"""Any server with an OpenAI-style `/v1/chat/completions`: its streamed reply is written down as tokens of our own.

Such servers send text and take messages, so the record holds the reply's text in the chat format under the bundled
byte-level tokenizer, which writes any text exactly. What it cannot have is a turn that goes on in its middle: a turn
that broke off is asked for again (`resumption` is "restart"; nothing of it had been acted upon). Give `--model` a
checkpoint to have turns resume at the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.agents.dialogue import Dialogue, plain
from rorqual.agents.models.base import Batch, Identity, Resumption, Turn
from rorqual.chat import markers
from rorqual.errors import ConfigError, MissingExtraError, RequestError
from rorqual.tokenizer import Tokenizer

CONNECT_S = 10.0


@dataclass
class _Call:
    name: str = ""
    arguments: str = ""


@dataclass
class _Writer:
    """Turns a server's deltas into ids in the order of the chat format."""

    dialogue: Dialogue
    calls: dict[int, _Call] = field(default_factory=dict)
    in_reasoning: bool = True

    def take(self, delta: Mapping[str, Any]) -> list[int]:
        """Ids of one delta."""
        tokenizer, ids = self.dialogue.tokenizer, []
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str) and self.dialogue.thinking and self.in_reasoning:
            ids += tokenizer.encode(plain(reasoning), allow_special=False)
        content = delta.get("content")
        if isinstance(content, str) and content:
            ids += self._leave_reasoning() + tokenizer.encode(plain(content), allow_special=False)
        for i, part in enumerate(delta.get("tool_calls") or ()):
            call = self.calls.setdefault(int(part.get("index", i)), _Call())
            function = part.get("function") or {}
            call.name += function.get("name") or ""
            call.arguments += function.get("arguments") or ""
        return ids

    def end(self, closed: bool) -> list[int]:
        """Ids of the calls and of the end; a reply that was cut off has neither its calls nor an end."""
        if not closed:
            return []
        calls = [(call.name, call.arguments or "{}") for _, call in sorted(self.calls.items()) if call.name]
        bare = Dialogue(self.dialogue.tokenizer, (), thinking=False)
        return self._leave_reasoning() + bare.reply_ids("", "", calls)

    def _leave_reasoning(self) -> list[int]:
        if not (self.in_reasoning and self.dialogue.thinking):
            return []
        self.in_reasoning = False
        return [self.dialogue.tokenizer.token_id(markers.THINK_END)]


class ChatBackend:
    """A model behind a URL. url: the server's, with or without `/v1`. key: sent as bearer token.

    Raises: ConfigError for an address that is none or a server that names no model; MissingExtraError.
    """

    resumption: Resumption = "restart"
    thinking = True

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        key: str | None = None,
        temperature: float | None = None,
        patience_s: float = 300.0,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError(
                'talking to a model server needs httpx2. Install it with: pip install "rorqual[agents]"'
            ) from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a model server. Give one such as http://127.0.0.1:8000.")
        self._url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer, self._tools, self._temperature = tokenizer, list(tools), temperature
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx2.Timeout(patience_s, connect=CONNECT_S)
        self._client = httpx2.Client(headers=headers, timeout=timeout, trust_env=False)
        self._errors: type[Exception] = httpx2.HTTPError
        name = model or self._first_model()
        self.identity = Identity(name, f"server {self._url}", tokenizer.fingerprint)

    def generate(self, turn: Turn) -> Iterator[Batch]:
        """Raises: RequestError when the server refuses, breaks off or sends what is no reply."""
        writer = _Writer(Dialogue(self.tokenizer, self._tools, self.thinking))
        finish, counts = None, None
        try:
            with self._client.stream("POST", f"{self._url}/v1/chat/completions", json=self._body(turn)) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise self._refused(answer.status_code, answer.text)
                for line in answer.iter_lines():
                    if turn.should_stop():
                        return
                    part = _data(line)
                    if part is None:
                        continue
                    if part.get("error"):
                        raise self._refused(502, json.dumps(part["error"]))
                    counts = _usage(part) or counts
                    for choice in part.get("choices") or ():
                        finish = choice.get("finish_reason") or finish
                        ids = writer.take(choice.get("delta") or {})
                        if ids:
                            yield Batch(ids)
        except self._errors as error:
            raise RequestError(
                f"the model server {self._url} broke off ({type(error).__name__}: {error}), so the turn has no end. "
                "Look whether it runs, then go on with --resume.",
                status=502,
            ) from None
        if finish is None:
            raise RequestError(
                f"the answer of {self._url} ended without a finish_reason, so nobody knows whether it is whole. "
                "Go on with --resume, which asks again.",
                status=502,
            )
        yield Batch(writer.end(finish != "length"), finish="length" if finish == "length" else None, usage=counts)

    def _body(self, turn: Turn) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.identity.model,
            "messages": list(turn.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": turn.max_tokens,
            "seed": turn.seed % (1 << 53),
        }
        if self._tools:
            body["tools"] = self._tools
        if self._temperature is not None:
            body["temperature"] = self._temperature
        return body

    def _first_model(self) -> str:
        try:
            answer = self._client.get(f"{self._url}/v1/models")
            names = [str(entry["id"]) for entry in answer.json()["data"]]
        except (self._errors, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._url}/v1/models names no models ({type(error).__name__}: {error}). Check the address, or name "
                "the model with --model-name."
            ) from None
        if not names:
            raise ConfigError(f"{self._url} serves no model. Name one with --model-name if it does not list them.")
        return names[0]

    def _refused(self, status: int, text: str) -> RequestError:
        return RequestError(
            f"the model server {self._url} refused the turn ({status}): {text[:300]}. Check the key, the model's name "
            "and whether it takes tools.",
            status=502,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _data(line: str) -> dict[str, Any] | None:
    if not line.startswith("data:"):
        return None
    text = line.removeprefix("data:").strip()
    if not text or text == "[DONE]":
        return None
    try:
        part = json.loads(text)
    except ValueError:
        raise RequestError(f"the model server sent {text[:80]!r}, which is no JSON.", status=502) from None
    return part if isinstance(part, dict) else None


def _usage(part: Mapping[str, Any]) -> tuple[int, int, int] | None:
    usage = part.get("usage")
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    cached = usage.get("prompt_cache_hit_tokens") or details.get("cached_tokens") or 0
    return int(usage.get("prompt_tokens") or 0), int(cached), int(usage.get("completion_tokens") or 0)
