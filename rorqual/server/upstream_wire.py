"""What is said to another OpenAI-style server, and what its answers and failures mean.

Three kinds are told apart by the owner they name in `/v1/models`: vLLM and SGLang, whose detokenisers must be told to
keep V4's markers, and any other (Rorqual among them), which is sent nothing beyond the API. Source: the public
documentation and protocol definitions of vLLM and SGLang.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from rorqual.engine import SamplingParams
from rorqual.engine.events import FinishReason
from rorqual.errors import ConfigError, RequestError

Dialect = Literal["vllm", "sglang", "openai"]

_CONNECT_S = 10.0
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "insufficient_system_resource": "cancelled"}


@dataclass(frozen=True)
class Delta:
    """One piece of an upstream's answer. usage: completion tokens and those of the prompt that its cache had."""

    text: str = ""
    finish: FinishReason | None = None
    usage: tuple[int, int] | None = None
    stop_string: str | None = None


class Link:
    """The connection to one model of an upstream. patience_s: longest silence within an answer."""

    def __init__(self, url: str, model: str, dialect: Dialect, key: str | None, patience_s: float) -> None:
        self.url, self.model, self.dialect, self.patience_s = url, model, dialect, patience_s
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(patience_s, connect=_CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
        )

    @asynccontextmanager
    async def stream(self, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[Delta]]:
        """Send a request; the block runs once it is accepted. Raises: RequestError, and httpx2's own errors."""
        async with self._client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise refused(self, response)
            yield self._deltas(response)

    async def _deltas(self, response: httpx2.Response) -> AsyncIterator[Delta]:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue  # comments that keep the connection alive, and empty lines
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield self._delta(data)

    def _delta(self, data: str) -> Delta:
        try:
            part = json.loads(data)
            if "error" in part or part.get("object") == "error":
                raise Broken(self, _message(part)).refusal()
            usage, choices = part.get("usage"), part.get("choices") or []
            choice = choices[0] if choices else {}
            finish = choice.get("finish_reason")
            if finish == "abort":
                raise Broken(self, "it aborted the request").refusal()
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            text = choice.get("text") or ""
            if not isinstance(text, str):
                raise TypeError(f"its text is {text!r}")
            return Delta(
                text=text,
                finish=None if finish is None else _FINISH.get(finish, "stop"),
                usage=None if usage is None else _counts(usage),
                stop_string=stop if isinstance(stop, str) else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Broken(self, f"it sent what is no completion chunk ({error})").refusal() from error

    async def answers(self) -> bool:
        """Whether the upstream answers at all."""
        try:
            response = await self._client.get(f"{self.url}/v1/models", timeout=_CONNECT_S)
        except httpx2.HTTPError:
            return False
        return response.status_code < 500

    async def close(self) -> None:
        await self._client.aclose()


@dataclass(frozen=True)
class Broken:
    """An upstream that failed while it answered."""

    link: Link
    why: str

    def refusal(self) -> RequestError:
        """As a 502 that names it."""
        return RequestError(
            f"The upstream server {self.link.url} broke off: {self.why}. What was answered so far is incomplete. Send "
            "the request again; if it fails again, look at that server's log.",
            status=502,
            type="upstream_error",
        )


def request_body(
    link: Link, prompt: Sequence[int], params: SamplingParams, max_tokens: int, seed: int, scope: str | None
) -> dict[str, Any]:
    """The completions request for token ids; `scope` keeps what is cached for one user from others."""
    body: dict[str, Any] = {
        "model": link.model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": seed,
    }
    if params.stop:
        body["stop"] = list(params.stop)
    if params.top_k is not None:
        body["top_k"] = params.top_k
    if params.min_p:
        body["min_p"] = params.min_p
    if scope is not None:
        body["user"] = scope
    if link.dialect in ("vllm", "sglang"):
        body |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    if link.dialect == "vllm" and scope is not None:
        body["cache_salt"] = scope
    return body


def refused(link: Link, response: httpx2.Response) -> RequestError:
    """What an upstream's HTTP error means for our client."""
    status = response.status_code
    try:
        words = _message(response.json())
    except ValueError:
        words = response.text.strip()[:200] or "no reason given"
    told = f"The upstream server {link.url} refuses the request (HTTP {status}: {words})."
    if status == 429:
        again = response.headers.get("retry-after", "")
        return RequestError(
            f"{told} It is busy; try again later.",
            status=429,
            type="rate_limit_error",
            retry_after_s=float(again) if again.isdigit() else 1.0,
        )
    if status in (400, 413, 422):
        return RequestError(f"{told} Change the request accordingly.", status=400)
    advice = {
        401: "It asks for a key: start this server with RORQUAL_UPSTREAM_KEY set.",
        403: "Its key may not do this: check RORQUAL_UPSTREAM_KEY.",
        404: f"It has no model {link.model!r} or no /v1/completions: check --upstream and --upstream-model.",
    }.get(status, "Look at that server's log, then try again.")
    return RequestError(f"{told} {advice}", status=502, type="upstream_error")


def unreachable(link: Link, error: httpx2.HTTPError, after_s: float) -> RequestError:
    """What a failed connection means for our client."""
    if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
        return RequestError(
            f"The upstream server {link.url} sent nothing for {link.patience_s:g} s, so this request was given up "
            f"after {after_s:.0f} s. Try again, or raise --upstream-timeout.",
            status=504,
            type="upstream_error",
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return RequestError(
            f"The upstream server {link.url} cannot be reached ({error or type(error).__name__}). Check that it runs, "
            "then try again.",
            status=502,
            type="upstream_error",
        )
    return Broken(link, f"the connection was lost ({type(error).__name__}: {error})").refusal()


@dataclass(frozen=True)
class Offer:
    """What an upstream says of itself: the model to ask for, its kind, and its context, where it tells."""

    model: str
    dialect: Dialect
    context: int | None


def connect(url: str, key: str | None = None, model: str | None = None) -> Offer:
    """Ask an upstream what it serves. Raises: ConfigError when nothing answers there, or it has no such model."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        response = httpx2.get(f"{url}/v1/models", headers=headers, timeout=_CONNECT_S, trust_env=False)
        offers = response.json()["data"] if response.status_code == 200 else []
        names = [str(one["id"]) for one in offers]
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{url} is no address ({error}). Write it as http://127.0.0.1:8100.") from error
    except httpx2.HTTPError as error:
        raise ConfigError(
            f"no server answers at {url} ({type(error).__name__}: {error}). Start it first, or correct --upstream."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{url}/v1/models is no list of models ({error}), so that is no OpenAI-style server. Correct --upstream: "
            "the address without /v1."
        ) from error
    if response.status_code != 200:
        raise ConfigError(
            f"{url}/v1/models answers with HTTP {response.status_code}. Check --upstream, and RORQUAL_UPSTREAM_KEY if "
            "it asks for a key."
        )
    wanted = model if model is not None else (names[0] if names else None)
    found = next((one for one in offers if str(one["id"]) == wanted), None)
    if found is None:
        raise ConfigError(
            f"{url} has no model {wanted!r}; it serves {', '.join(names) or 'none'}. Name one with --upstream-model."
        )
    owner = str(found.get("owned_by", ""))
    dialect: Dialect = "vllm" if owner == "vllm" else "sglang" if owner == "sglang" else "openai"
    context = found.get("max_model_len")
    return Offer(str(found["id"]), dialect, context if isinstance(context, int) else None)


def _counts(usage: Any) -> tuple[int, int]:
    """Completion tokens, and prompt tokens from a cache. Raises: TypeError for what are no counts."""
    details = usage.get("prompt_tokens_details") or {}
    counts = usage["completion_tokens"], details.get("cached_tokens") or 0
    if not all(type(count) is int and count >= 0 for count in counts):
        raise TypeError(f"its usage counts are {counts}")
    return counts


def _message(body: Any) -> str:
    """The words of an error body, in any of the shapes these servers use."""
    error = body.get("error", body) if isinstance(body, dict) else body
    words = error.get("message") if isinstance(error, dict) else error
    return str(words)[:500]
