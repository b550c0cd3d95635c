"""A model as the server offers it, and what chat and completions have in common."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import RequestError
from rorqual.server.schema import MAX_OUTPUT, Sampling
from rorqual.server.upstream import RemoteEngine
from rorqual.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A name, the engine behind it, and the prompt revision its checkpoint was trained with."""

    name: str
    engine: Engine | RemoteEngine
    revision: str = "2026-04"

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.tokenizer
        assert isinstance(tokenizer, Tokenizer), "the server needs rorqual.tokenizer.Tokenizer for its markers"
        return tokenizer

    @property
    def max_output(self) -> int:
        return min(MAX_OUTPUT, self.engine.context_limit)

    def params(
        self, body: Sampling, prompt_tokens: int, limit: int, default: int, *, lower: bool = False, **more: Any
    ) -> SamplingParams:
        """What the request asks for. `limit` and `default` bound and fill in max_tokens.

        lower: a max_tokens beyond what there is room for is lowered instead of refused.
        Raises: RequestError naming the field that is out of range.
        """
        max_tokens = body.max_tokens
        room = max(1, self.engine.context_limit - prompt_tokens)
        if lower and max_tokens is not None:
            max_tokens = min(max_tokens, limit, room)
        if max_tokens is not None and not 1 <= max_tokens <= limit:
            raise RequestError(
                f"Invalid max_tokens value, the valid range of max_tokens is [1, {limit}]", param="max_tokens"
            )
        if max_tokens is None:
            max_tokens = min(default, room)
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
            if (value := getattr(body, name)) is not None
        }
        return SamplingParams(max_tokens=max_tokens, **given, **more)


@dataclass(frozen=True)
class Envelope:
    """The fields that every part of one answer shares."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choice: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": hashlib.blake2b(f"rorqual {self.model}".encode(), digest_size=16).hexdigest(),
            "choices": [{"index": 0, **choice}],
            **more,
        }
