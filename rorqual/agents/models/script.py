"""A model that says what a file says: recorded replies, tokenised and emitted a token at a time like any other's.

It drives the examples where no model can run, and takes the same path through the journal. A script is JSON:

    {"replies": [{"reasoning": "...", "content": "...", "calls": [{"name": "shell", "arguments": {"command": "ls"}}]}]}
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.agents.dialogue import Dialogue
from rorqual.agents.models.base import Batch, Identity, Resumption, Turn
from rorqual.errors import ConfigError
from rorqual.tokenizer import Tokenizer

REPLY_KEYS = {"reasoning", "content", "calls"}


def load_script(path: Path) -> list[dict[str, Any]]:
    """The replies of a script file. Raises: ConfigError saying what in it is wrong."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the reply script {path} cannot be read ({error}). Give a JSON file with `replies`."
        ) from None
    replies = read.get("replies") if isinstance(read, dict) else None
    if not isinstance(replies, list) or not replies:
        raise ConfigError(f"the reply script {path} has no list `replies`, so the model would say nothing. Add one.")
    for i, reply in enumerate(replies):
        wrong = set(reply) - REPLY_KEYS if isinstance(reply, dict) else {type(reply).__name__}
        if wrong:
            raise ConfigError(
                f"replies[{i}] of {path} has {', '.join(sorted(wrong))}; a reply has reasoning, content and calls only."
            )
    return replies


class ScriptBackend:
    """Turn `n` is reply `n`. pace_s: seconds between two tokens, 0 for as fast as they can be recorded."""

    resumption: Resumption = "exact"

    def __init__(
        self, replies: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, thinking: bool = True, pace_s: float = 0.0
    ) -> None:
        self.tokenizer, self.thinking, self._pace_s = tokenizer, thinking, pace_s
        dialogue = Dialogue(tokenizer, (), thinking)
        self._turns = [_ids(dialogue, reply, i) for i, reply in enumerate(replies)]
        text = json.dumps(list(replies), sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.identity = Identity("script", f"script {digest}", tokenizer.fingerprint)

    def generate(self, turn: Turn) -> Iterator[Batch]:
        """Raises: ConfigError when the run takes more turns than the script has replies."""
        if turn.index >= len(self._turns):
            raise ConfigError(
                f"the reply script has {len(self._turns)} replies and the run asks for turn {turn.index + 1}. "
                "Add a reply without calls at its end."
            )
        rest = self._turns[turn.index][turn.begun :][: turn.max_tokens]
        for token in rest:
            if turn.should_stop():
                return
            if self._pace_s:
                time.sleep(self._pace_s)
            yield Batch([token], [0.0])

    def close(self) -> None:
        """Nothing is held."""


def _ids(dialogue: Dialogue, reply: Mapping[str, Any], index: int) -> list[int]:
    calls = [_call(call, index) for call in reply.get("calls") or ()]
    return dialogue.reply_ids(str(reply.get("reasoning") or ""), str(reply.get("content") or ""), calls)


def _call(call: Any, index: int) -> tuple[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ConfigError(f'replies[{index}] has a call without a name. Write {{"name": ..., "arguments": {{...}}}}.')
    return call["name"], call.get("arguments") or {}
