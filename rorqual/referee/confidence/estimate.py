"""The confidence a gateway asks for: the probability that an answer it holds is right.

The first look is free where the answer came with `logprobs`; only where it is too close to call are paraphrases asked,
and samples after that. Nothing is estimated for tool calls, for answers without log probabilities, or for questions
that are no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rorqual import log
from rorqual.errors import RequestError
from rorqual.referee.confidence.calibrator import Calibrator
from rorqual.referee.confidence.decision import MAX_EXTRA_CALLS, Cascade, threshold_of
from rorqual.referee.confidence.engine_source import TOP
from rorqual.referee.confidence.observation import Observation, from_chat_logprobs
from rorqual.referee.confidence.signals import BY_NAME, lexical_support, measure
from rorqual.referee.confidence.url_source import UrlSource, generic_paraphrases

logger = log.get(__name__)

PARAPHRASES = 3
SAMPLES = 5


class CalibratedConfidence:
    """A gateway's `Confidence` by a fitted calibrator, for the upstream that it was fitted on.

    profile: whose threshold p is compared with, which decides where a closer look is worth its calls.
    paraphrase: makes that many wordings of a question.
    """

    request_fields: Mapping[str, Any] = MappingProxyType({"logprobs": True, "top_logprobs": TOP})
    """What requests to the upstream must ask for, so that there is something to estimate from."""

    def __init__(
        self,
        calibrator: Calibrator,
        source: UrlSource,
        *,
        profile: str = "chat",
        max_extra_calls: float = MAX_EXTRA_CALLS,
        paraphrase: Callable[[str, int], Sequence[str]] = generic_paraphrases,
    ) -> None:
        self.calibrator, self.source = calibrator, source
        self._paraphrase = paraphrase
        calls = {tier.tier: _calls(tier.signals, tier.tier) for tier in calibrator.tiers}
        self.cascade = Cascade.plan(calibrator, threshold_of(profile), calls, max_extra_calls)
        self._wants_question = any(BY_NAME[name].source == "s3" for tier in calibrator.tiers for name in tier.signals)

    async def estimate(self, request: Any, answer: Any) -> float | None:
        """The probability that `answer` to the chat `request` is right; None where nothing can be said.

        request: the body of a chat completion, or an object with it as `body`. answer: an object with `content`,
        `calls` and `logprobs` (as the server sent them). A closer look that fails leaves the estimate of the first.
        """
        body = getattr(request, "body", request)
        messages = list(body.get("messages") or ()) if isinstance(body, Mapping) else []
        if isinstance(body, Mapping) and body.get("model", self.source.model) != self.source.model:
            return None  # another model, of which it knows nothing
        question = _text(messages[-1].get("content")) if messages and messages[-1].get("role") == "user" else None
        content = getattr(answer, "content", None)
        tokens = from_chat_logprobs(getattr(answer, "logprobs", None))
        if not question or not content or getattr(answer, "calls", None) or not tokens:
            return None
        source = replace(self.source, client=self.source.client, system=None, history=messages[:-1], calls=0)
        seen = Observation(question=question, answer=content, answer_tokens=tokens)
        if self._wants_question:
            seen = await _tried(source.with_question(seen), seen)
            self.source.reads_prompts = source.reads_prompts
        for step in range(len(self.cascade.bands) + 1):
            choice, p = self.cascade.choose(measure(seen, self.calibrator.frequency), step)
            if choice != "look closer":
                return p
            closer = await _tried(self._closer(source, seen, self.calibrator.tiers[step + 1].signals), None)
            if closer is None:
                return p
            seen = closer
        raise AssertionError("the last tier has no band")

    async def _closer(self, source: UrlSource, seen: Observation, signals: Sequence[str]) -> Observation:
        """The observation with what `signals` need and it lacks."""
        needs = {BY_NAME[name].source for name in signals}
        if "s5" in needs and seen.other_answers is None:
            seen = await source.paraphrased(seen, self._paraphrase(seen.question, PARAPHRASES))
        if "s4" in needs and seen.p_true is None:
            seen = await source.checked(seen)
        if "s6" in needs and seen.samples is None:
            seen = await source.sampled(seen, SAMPLES)
        if "s8" in needs and seen.support is None and source.history:
            texts = "\n".join(filter(None, (_text(one.get("content")) for one in source.history)))
            seen = replace(seen, support=lexical_support(seen.question, seen.answer, texts))
        return seen


def _calls(signals: Sequence[str], tier: int) -> int:
    """How many requests the signals of this very tier take."""
    needs = {BY_NAME[name].source for name in signals if BY_NAME[name].tier == tier}
    costs = {"s4": 2, "s5": PARAPHRASES, "s6": SAMPLES}
    return sum(costs.get(source, 0) for source in needs)


async def _tried(work: Any, otherwise: Any) -> Any:  # an awaitable of an observation
    try:
        return await work
    except RequestError as error:
        logger.warning("A closer look at an answer failed: %s", error)
        return otherwise


def _text(content: Any) -> str | None:  # Any: whatever JSON holds
    """Text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str)) or None
    return None
