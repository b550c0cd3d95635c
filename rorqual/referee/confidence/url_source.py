"""Observations from any server with an OpenAI-style API: chat answers with `logprobs`, and more calls where allowed.

A chat API can neither score a given answer nor, on most servers, a prompt. So the paraphrases are answered afresh, and
what a differing answer says about ours is a bound: it left at most the rest of the probability. The question's own
tokens come from `/v1/completions` with `echo`, which our server has and few hosted ones do; a server that refuses it
is not asked again, and the signals of s3 stay out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rorqual.errors import MissingExtraError, RequestError
from rorqual.referee.confidence.engine_source import ABSTENTION_CLAUSE, ABSTENTIONS, SELF_CHECK, TOP
from rorqual.referee.confidence.observation import Observation, Token, from_chat_logprobs
from rorqual.referee.confidence.signals import plain

WRAPPERS = (
    "Please answer this question: {question}",
    "Question: {question}\nAnswer:",
    "{question} Reply with the answer alone.",
)
"""Wordings for questions of unknown kind. Paraphrases by a person say more."""

_REFUSALS = (400, 404, 405, 422, 501)


def generic_paraphrases(question: str, count: int = len(WRAPPERS)) -> list[str]:
    """The question in other clothes, without a model."""
    return [wrapper.format(question=question) for wrapper in WRAPPERS[:count]]


@dataclass
class UrlSource:
    """One model of a server. url: with or without `/v1`. system, history: stand before each question.

    client: an `httpx2.AsyncClient` to use (it is then the caller's to close). calls: how many requests were sent.
    body: fields to add to each chat request, such as `{"thinking": {"type": "disabled"}}`.
    """

    url: str
    model: str
    key: str | None = None
    system: str | None = None
    history: Sequence[Mapping[str, Any]] = ()
    max_tokens: int = 256
    patience_s: float = 120.0
    body: Mapping[str, Any] = field(default_factory=dict)
    client: Any = None  # httpx2.AsyncClient; the package is optional
    calls: int = 0
    reads_prompts: bool = True
    """Whether `/v1/completions` with echo is tried for the question's tokens."""
    top: int = TOP

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self._owns_client = self.client is None
        if self._owns_client:
            self.client = _new_client(self.patience_s)

    async def close(self) -> None:
        if self._owns_client:
            await self.client.aclose()

    async def answer(self, question: str, entity: str | None = None) -> Observation:
        """The greedy answer with its log probabilities. Raises: RequestError when the server refuses or fails."""
        text, tokens = await self._chat(question, temperature=0.0)
        seen = Observation(question=question, answer=text, answer_tokens=tokens, entity=entity)
        return await self.with_question(seen)

    async def with_question(self, seen: Observation) -> Observation:
        """The same with the question's tokens as the server reads them, where it tells."""
        return replace(seen, question_tokens=await self._read(seen.question))

    async def paraphrased(self, seen: Observation, wordings: Sequence[str]) -> Observation:
        """s5: answers to other wordings, asked at once."""
        found = await asyncio.gather(*(self._chat(wording, temperature=0.0) for wording in wordings))
        logprobs = tuple(_as_ours(seen.answer, text, tokens) for text, tokens in found)
        has_scores = all(tokens for _, tokens in found)
        answers = tuple(text for text, _ in found)
        return replace(seen, other_answers=answers, other_logprobs=logprobs if has_scores else None)

    async def sampled(self, seen: Observation, count: int) -> Observation:
        """s6: answers at temperature 1, asked at once."""
        found = await asyncio.gather(*(self._chat(seen.question, temperature=1.0) for _ in range(count)))
        return replace(seen, samples=tuple(text for text, _ in found))

    async def checked(self, seen: Observation) -> Observation:
        """s4 and s7: P(True), and the chance of an abstention when the prompt allows one; None where none is told."""
        asked = SELF_CHECK.format(question=seen.question, answer=seen.answer)
        judged, allowed = await asyncio.gather(self._first(asked), self._first(f"{seen.question} {ABSTENTION_CLAUSE}"))
        yes, no = _mass(judged, ("yes",)), _mass(judged, ("no",))
        openings = tuple(text.split()[0] for text in ABSTENTIONS)
        return replace(
            seen,
            p_true=yes / (yes + no) if yes + no > 0 else None,
            abstain_mass=_mass(allowed, openings) if allowed else None,
        )

    async def _chat(self, question: str, *, temperature: float) -> tuple[str, tuple[Token, ...]]:
        choice = await self._choice(question, temperature=temperature, max_tokens=self.max_tokens)
        text = (choice.get("message") or {}).get("content")
        return text if isinstance(text, str) else "", from_chat_logprobs(choice.get("logprobs"))

    async def _first(self, question: str) -> dict[str, float]:
        """Log probabilities of the likeliest first tokens by text; empty where the server tells none."""
        choice = await self._choice(question, temperature=0.0, max_tokens=1)
        logprobs = choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
        found: dict[str, float] = {}
        if content:
            for one in (content[0], *(content[0].get("top_logprobs") or ())):
                found.setdefault(str(one.get("token")), float(one.get("logprob", -math.inf)))
        return found

    async def _choice(self, question: str, **more: Any) -> Mapping[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.history, {"role": "user", "content": question}]
        body = {
            "model": self.model, "messages": messages, "logprobs": True, "top_logprobs": self.top, **self.body, **more,
        }  # fmt: skip
        answer = await self._post("/v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            if not isinstance(choice, Mapping):
                raise TypeError(f"its choice is {choice!r}")
            return choice
        except (KeyError, IndexError, TypeError) as error:
            raise RequestError(
                f"{self.url} sent what is no chat completion ({type(error).__name__}: {error}). Check the address.",
                status=502,
                type="upstream_error",
            ) from error

    async def _read(self, text: str) -> tuple[Token, ...] | None:
        if not self.reads_prompts:
            return None
        body = {"model": self.model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        try:
            answer = await self._post("/v1/completions", body)
            told = answer["choices"][0]["logprobs"]
            tokens = tuple(
                Token(str(token), None if score is None else float(score))
                for token, score in zip(told["tokens"], told["token_logprobs"], strict=True)
            )
        except RequestError as error:
            if error.status not in _REFUSALS:
                raise
            tokens = ()
        except (KeyError, IndexError, TypeError, ValueError):
            tokens = ()
        read = "".join(token.text for token in tokens)
        if not read.startswith(text):  # no echo: the answer's tokens alone, or nothing
            self.reads_prompts = False
            return None
        return tokens

    async def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        import httpx2

        self.calls += 1
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        try:
            response = await self.client.post(f"{self.url}{path}", json=body, headers=headers)
        except httpx2.HTTPError as error:
            raise RequestError(
                f"{self.url} cannot be reached ({type(error).__name__}: {error}). Check the address and that it runs.",
                status=502,
                type="upstream_error",
            ) from error
        if response.status_code != 200:
            raise RequestError(
                f"{self.url}{path} answered {response.status_code}: {response.text[:300]}. See that server's "
                "documentation for what it takes.",
                status=response.status_code,
                type="upstream_error",
            )
        try:
            answer = response.json()
        except ValueError as error:
            raise RequestError(
                f"{self.url}{path} sent no JSON ({error}). Check the address.", status=502, type="upstream_error"
            ) from error
        return answer if isinstance(answer, Mapping) else {}


def _new_client(patience_s: float) -> Any:  # httpx2.AsyncClient
    try:
        import httpx2
    except ImportError as error:
        raise MissingExtraError(
            'A confidence from a URL needs the package httpx2, which is absent. Run pip install "rorqual[serve]".'
        ) from error
    return httpx2.AsyncClient(timeout=httpx2.Timeout(patience_s, connect=10.0), trust_env=False)


def _as_ours(ours: str, theirs: str, tokens: Sequence[Token]) -> float:
    """Mean log probability of our answer under a wording that was answered by `theirs`, or a bound on it."""
    scores = [token.logprob for token in tokens if token.logprob is not None]
    if not scores:
        return 0.0
    if plain(ours) == plain(theirs):
        return sum(scores) / len(scores)
    rest = -math.expm1(min(sum(scores), 0.0))
    return math.log(rest) if rest > 0 else -math.inf


def _mass(told: Mapping[str, float], openings: Sequence[str]) -> float:
    """Probability of the told tokens that one of `openings` begins with, case and space aside."""
    wanted = [text.casefold() for text in openings]
    chances = [
        math.exp(score)
        for token, score in told.items()
        if (text := token.strip().casefold()) and any(text == want for want in wanted)
    ]
    return min(sum(chances), 1.0)
