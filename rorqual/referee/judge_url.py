"""A judge behind any OpenAI-style endpoint. Usable from any event loop: it asks from threads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rorqual.errors import MissingExtraError, RequestError
from rorqual.referee.answer import Answer, read_answer
from rorqual.referee.judge import Judge


class JudgeServer:
    """One model of a server. url: with or without `/v1`. fields: for every request, e.g. thinking switched off."""

    def __init__(
        self, url: str, model: str, key: str | None = None, *, patience_s: float = 120.0,
        fields: Mapping[str, Any] | None = None, transport: Any = None,
    ) -> None:  # fmt: skip
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError(
                'A judge behind a URL needs the package httpx2, which is absent. Run pip install "rorqual[serve]".'
            ) from error
        self.url, self.model, self.fields = url.rstrip("/").removesuffix("/v1"), model, dict(fields or {})
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._failures = httpx2.HTTPError
        self._client = httpx2.Client(headers=headers, timeout=patience_s, trust_env=False, transport=transport)

    @property
    def judge(self) -> Judge:
        return Judge(self.ask, self.model, self.fields)

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """The answer to a chat request. Raises: RequestError where the server refuses or fails."""
        return await asyncio.to_thread(self.send, body)

    def send(self, body: Mapping[str, Any]) -> Answer:
        """As `ask`, waiting for it."""
        try:
            reply = self._client.post(f"{self.url}/v1/chat/completions", json=dict(body))
            if reply.status_code == 200:
                return read_answer(reply.json())
            says = f"answered {reply.status_code}: {reply.text[:200]}"
        except self._failures as error:
            says = f"cannot be reached ({type(error).__name__}: {error})"
        except ValueError as error:
            says = f"sent what is no JSON ({error})"
        raise RequestError(
            f"The judge {self.url} {says}. Check the address, the model's name and the key.",
            status=502,
            type="upstream_error",
        )

    def close(self) -> None:
        self._client.close()
