"""What stands behind a judge: an engine in this process (the actor itself), or any OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rorqual.chat import encode_messages
from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import Message, Mode
from rorqual.errors import ConfigError, MissingExtraError, RequestError

if TYPE_CHECKING:
    from rorqual.engine import Engine


class EngineJudge:
    """Judgements by the model in `engine`. mode: with or without reasoning, which is not part of what is read."""

    def __init__(self, engine: Engine, *, mode: Mode = "chat", max_tokens: int = 256, temperature: float = 1.0) -> None:
        self._engine, self._mode, self._max_tokens, self._temperature = engine, mode, max_tokens, temperature

    def answer(self, prompts: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
        """Raises: RequestError as `Engine.generate`."""
        from rorqual.engine import SamplingParams

        texts = [encode_messages(list(messages), thinking_mode=self._mode) for messages in prompts]
        ids = [self._engine.tokenizer.encode(text) for text in texts]
        params = [
            SamplingParams(temperature=self._temperature, max_tokens=self._max_tokens, seed=seed) for seed in seeds
        ]
        done = self._engine.generate(ids, params) if ids else []
        return [final_answer(completion.text, self._mode) for completion in done]


class UrlJudge:
    """Judgements by a server with `/v1/chat/completions`. key: sent as bearer token; parallel: requests at a time.

    Raises: ConfigError for an address that is none; MissingExtraError without httpx2.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        parallel: int = 8,
        timeout_s: float = 300.0,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError(
                'a judge behind a URL needs httpx2. Install it with: pip install "rorqual[serve]"'
            ) from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a model server. Give one such as http://127.0.0.1:8000/v1.")
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._client = httpx2.Client(headers=headers, timeout=timeout_s)
        self._errors: type[Exception] = httpx2.HTTPError
        self._body = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        self._parallel = parallel

    def answer(self, prompts: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[str]:
        """Raises: RequestError when the server cannot be reached, refuses, or sends no answer."""
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="rorqual-judge") as pool:
            return list(pool.map(self._one, prompts, seeds))

    def _one(self, messages: Sequence[Message], seed: int) -> str:
        body: dict[str, Any] = {**self._body, "messages": list(messages), "seed": seed % (1 << 53)}
        try:
            reply = self._client.post(self._url, json=body)
        except self._errors as error:
            raise self._failed(f"{type(error).__name__}: {error}") from None
        if reply.status_code != 200:
            raise self._failed(f"status {reply.status_code}: {reply.text[:200]}")
        try:
            return str(reply.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError):
            raise self._failed(f"no chat completion: {reply.text[:200]}") from None

    def _failed(self, what: str) -> RequestError:
        return RequestError(
            f"the judge at {self._url} gave no judgement ({what}), so answers have no reward. Look whether it runs and "
            "takes this model's name, then resume the run.",
            status=502,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
