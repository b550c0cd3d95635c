"""Targets for tests of evaluations: they answer what a function says, without a model."""

import threading
from collections.abc import Callable

from rorqual.data.tasks.base import Item
from rorqual.evals.records import EngineOf, Sampling, Usage
from rorqual.evals.targets.base import Abstains, Answer, Identity, Prompt, TransportError

Reply = str | Exception
Says = Callable[[Item], Reply]


class ScriptedTarget:
    """Answers items by what `says` returns for them; an exception is raised instead. `asked` holds the item ids."""

    count_tokens = None

    def __init__(
        self, items: list[Item], says: Says, *, forced: Says | None = None, parallel: int = 4, finish: str = "stop"
    ) -> None:
        self._by_prompt = {_key(Prompt.of(item)): item for item in items}
        self._says, self._forced, self._finish = says, forced, finish
        self._lock = threading.Lock()
        self.asked: list[str] = []
        self.parallel = parallel
        self.can_force = forced is not None
        self.identity = Identity("scripted", "sha", "tokens", EngineOf(name="test", version="1", flags={}))

    def answer(self, prompt: Prompt, sampling: Sampling) -> Answer:
        return self._reply(prompt, self._says)

    def force(self, prompt: Prompt, sampling: Sampling, abstains: Abstains) -> Answer:
        assert self._forced is not None
        return self._reply(prompt, self._forced)

    def needle_signals(self, prompt: Prompt, answer: str, value: str, offset: int) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    def _reply(self, prompt: Prompt, says: Says) -> Answer:
        item = self._by_prompt.get(_key(prompt))
        if item is None:
            raise TransportError("404: nothing is written for this prompt")
        with self._lock:
            self.asked.append(item.id)
        reply = says(item)
        if isinstance(reply, Exception):
            raise reply
        usage = Usage(prompt=10, completion=len(reply.split()), cached=4)
        return Answer(reply, self._finish, usage, 1.0, 2.0, "prompt", 0.5, {"mean_logprob": -0.5, "min_logprob": -0.7})


def _key(prompt: Prompt) -> str:
    return repr((list(prompt.messages), prompt.mode))


__all__ = ["ScriptedTarget", "TransportError"]
