"""Any server with an OpenAI-style `/v1/chat/completions`.

The reply is written down as the completion the model would have to make for it, so that the same graders judge a
server and a checkpoint. What a server cannot do is not imitated: abstentions are masked through a checkpoint only.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Mapping
from typing import Any

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS, THINK_END
from rorqual.errors import ConfigError, MissingExtraError, RequestError
from rorqual.evals.records import EngineOf, Sampling, Usage
from rorqual.evals.targets.base import Abstains, Answer, Identity, Prompt, TransportError, sha, token_signals

KEY = "RORQUAL_MODEL_KEY"
"""Environment variable with the server's key; it is never written anywhere."""

CONNECT_S = 10.0
TRIES = 3
NOT_TOLD = "not told"
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}


class ServerTarget:
    """A model behind a URL, with or without `/v1`. model: its name there; the first one otherwise.

    Raises: ConfigError for an address that is none or a server that names no model; MissingExtraError.
    """

    can_force = False
    count_tokens = None

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        parallel: int = 8,
        patience_s: float = 300.0,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError(
                'talking to a model server needs httpx2. Install it with: pip install "rorqual[serve]"'
            ) from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a model server. Give one such as http://127.0.0.1:8000.")
        self._url, self.parallel = url.rstrip("/").removesuffix("/v1"), parallel
        self._errors: type[Exception] = httpx2.HTTPError
        self._client = httpx2.Client(
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(patience_s, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            trust_env=False,
        )
        self._refused: set[str] = set()  # optional fields that this server answered 400 to
        name = model or self._first_model()
        self.identity = Identity(
            name, NOT_TOLD, NOT_TOLD,
            EngineOf(name=f"server {self._url}", version=NOT_TOLD, flags={"determinism": "D0"}),
        )  # fmt: skip

    def answer(self, prompt: Prompt, sampling: Sampling) -> Answer:
        body = self._body(prompt, sampling)
        began = time.perf_counter()
        reply = self.post(body)
        total_ms = 1000 * (time.perf_counter() - began)
        try:
            choice = reply["choices"][0]
            message = choice["message"]
            usage = usage_of(reply.get("usage") or {})
            text = completion_of(message, prompt, str(choice.get("finish_reason")))
            said = [float(t["logprob"]) for t in ((choice.get("logprobs") or {}).get("content") or ())]
        except (KeyError, IndexError, TypeError, ValueError, RequestError) as error:
            raise TransportError(f"the reply is no chat completion ({type(error).__name__}: {error})") from None
        signals = token_signals(said) | _restored(reply, prompt)
        return Answer(
            text, str(choice.get("finish_reason")), usage, None, total_ms,
            sha(json.dumps([body["messages"], body.get("tools")], sort_keys=True).encode()),
            math.exp(min(0.0, signals["min_logprob"])) if said else None, signals,
        )  # fmt: skip

    def force(self, prompt: Prompt, sampling: Sampling, abstains: Abstains) -> Answer:
        raise ConfigError(
            f"{self._url} cannot be made to answer: masking an abstention needs the model's own scores. Give the "
            "checkpoint with --model for RET and RESCUE."
        )

    def needle_signals(self, prompt: Prompt, answer: str, value: str, offset: int) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._client.close()

    def _body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        if prompt.text is not None:
            raise TransportError("a completion prompt has no messages, and this target takes only those")
        body: dict[str, Any] = {
            "model": self.identity.model_id,
            "messages": [dict(message) for message in prompt.messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "logprobs": True,
            "thinking": {"type": "enabled" if prompt.mode == "thinking" else "disabled"},
        }
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        if prompt.effort is not None:
            body["reasoning_effort"] = prompt.effort
        return {name: value for name, value in body.items() if name not in self._refused}

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request's body; asks again after a failure that may pass. Raises: TransportError."""
        problem, status = "", None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(8.0, 2.0**attempt) * (0.5 + random.random() / 2))
            try:
                answer = self._client.post(f"{self._url}/v1/chat/completions", json=body)
            except self._errors as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 200:
                try:
                    found = answer.json()
                except ValueError:
                    problem = f"the reply is no JSON: {answer.text[:100]!r}"
                    continue
                return found if isinstance(found, dict) else {}
            problem, status = f"{answer.status_code}: {answer.text[:300]}", answer.status_code
            dropped = self._without_refused(body, answer.status_code, answer.text)
            if dropped is not None:
                return self.post(dropped)
            if answer.status_code not in _AGAIN:
                break
        raise TransportError(problem, status)

    def _without_refused(self, body: dict[str, Any], status: int, text: str) -> dict[str, Any] | None:
        """The body without the optional field that a 400 or 422 names; remembered for later requests."""
        if status not in (400, 422):
            return None
        named = [name for name in ("thinking", "logprobs", "seed", "top_p") if name in body and name in text]
        if not named:
            return None
        self._refused.update(named)
        return {name: value for name, value in body.items() if name not in named}

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


def completion_of(message: dict[str, Any], prompt: Prompt, finish: str) -> str:
    """The raw completion that gives `message`: what the model behind the server would have written.

    A reply cut off inside its reasoning stays open. Raises: RequestError for calls that are none.
    """
    reasoning = str(message.get("reasoning_content") or message.get("reasoning") or "")
    content, calls = str(message.get("content") or ""), message.get("tool_calls") or []
    if prompt.mode == "thinking" and finish == "length" and not content and not calls:
        return reasoning
    head = f"{reasoning}{THINK_END}" if prompt.mode == "thinking" else ""
    if not calls:
        return head + content
    asked: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    made = {"role": "assistant", "content": content, "tool_calls": calls}
    before, after = (
        encode_messages(m, thinking_mode="chat", add_default_bos_token=False) for m in (asked, [*asked, made])
    )
    return head + after[len(before) :].removesuffix(EOS)


def _restored(reply: dict[str, Any], prompt: Prompt) -> dict[str, float]:
    """Of the assistant messages sent without reasoning, the share whose reasoning the server says it put back."""
    told = (reply.get("rorqual") or {}).get("continuity")
    lacking = sum(m.get("role") == "assistant" and m.get("reasoning_content") is None for m in prompt.messages)
    return {"restored": len(told.get("restored") or ()) / lacking} if isinstance(told, dict) and lacking else {}


def usage_of(usage: Mapping[str, Any]) -> Usage:
    """Of a chat completion's `usage`, in the words of a record."""
    prompt, output = (usage.get(f"{side}_tokens_details") or {} for side in ("prompt", "completion"))
    return Usage(
        prompt=int(usage.get("prompt_tokens") or 0),
        completion=int(usage.get("completion_tokens") or 0),
        reasoning=int(output.get("reasoning_tokens") or 0),
        cached=int(usage.get("prompt_cache_hit_tokens") or prompt.get("cached_tokens") or 0),
    )
