"""The signals of confidence: numbers about one answer, each for a different way of not knowing.

Source: evaluation specification, section 7.1 (s1 to s8), and one of our own, `recall`, which asks backwards; semantic
entropy: Kuhn, Gal and Farquhar (2023), in its discrete form; P(True): Kadavath et al. (2022). Left out: s9, the health
of sparse selection, which is the engine's. A probe on hidden states is not among them: it does not transfer to other
entities.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rorqual.referee.confidence.observation import Observation, Token, entities, tokens_of

NO_CHANCE = -30.0
"""Log probabilities below are raised to this, so that one impossible token does not drown the rest."""


@dataclass(frozen=True)
class Signal:
    """name, the specification's number, the tier that pays for it, and whether more of it speaks for the answer."""

    name: str
    source: str
    tier: int
    rises: bool


SIGNALS: tuple[Signal, ...] = (
    Signal("mean_logprob", "s1", 0, True),
    Signal("min_logprob", "s1", 0, True),
    Signal("margin", "s2", 0, True),
    Signal("entropy", "s2", 0, False),
    Signal("familiarity", "s3", 0, True),
    Signal("weakest_part", "s3", 0, True),
    Signal("fit", "s3", 0, True),
    Signal("abstain_mass", "s7", 0, False),
    Signal("p_true", "s4", 1, True),
    Signal("agreement", "s5", 1, True),
    Signal("shared_logprob", "s5", 1, True),
    Signal("worst_logprob", "s5", 1, True),
    Signal("shared_familiarity", "s5", 1, True),
    Signal("worst_fit", "s5", 1, True),
    Signal("recall", "reverse", 1, True),
    Signal("semantic_entropy", "s6", 2, False),
    Signal("support", "s8", 2, True),
)
BY_NAME = {signal.name: signal for signal in SIGNALS}


def measure(seen: Observation, frequency: Mapping[str, float] | None = None) -> dict[str, float]:
    """Every signal that `seen` has the material for, by name.

    frequency: log probability of a token by its text, to tell a rare name from an unknown one; a token that is not
    in it counts as the rarest in it.
    """
    found: dict[str, float | None] = {
        **_likelihood(seen),
        **_question(seen, frequency),
        **_paraphrases(seen),
        "recall": _recall(seen),
        "abstain_mass": seen.abstain_mass,
        "p_true": seen.p_true,
        "semantic_entropy": None if not seen.samples else semantic_entropy(seen.samples),
        "support": seen.support,
    }
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _likelihood(seen: Observation) -> dict[str, float | None]:
    """s1 and s2, of the tokens written."""
    scores = _logprobs(seen.answer_tokens)
    if not scores:
        return {}
    first = next((t for t in seen.answer_tokens if t.text.strip()), seen.answer_tokens[0])
    return {
        "mean_logprob": sum(scores) / len(scores),
        "min_logprob": min(scores),
        "margin": margin(first.top) if len(first.top) > 1 else None,
        "entropy": entropy(first.top) if first.top else None,
    }


def _question(seen: Observation, frequency: Mapping[str, float] | None) -> dict[str, float | None]:
    """s3 of the question as asked."""
    about = _name(seen)
    if about is None or not seen.question_tokens:
        return {}
    familiarity, weakest, fit = read_question(seen.question_tokens, about, frequency)
    return {"familiarity": familiarity, "weakest_part": weakest, "fit": fit}


def _name(seen: Observation) -> str | None:
    names = [seen.entity] if seen.entity else entities(seen.question)
    return max(names, key=len) if names else None


def read_question(
    tokens: Sequence[Token], name: str, frequency: Mapping[str, float] | None = None
) -> tuple[float | None, float | None, float | None]:
    """How expected a question was: its entity per token, the entity's least expected token, and what is asked of it.

    The last is the log probability of everything behind the entity, None where that is no word: a question that names
    the attribute first says there how well entity and attribute go together, one that begins with it does not.
    """
    entity = tokens_of(tuple(tokens), name)
    scores = _logprobs(entity)
    if not scores:
        return None, None, None
    gains = [score - base for score, base in zip(scores, _expected(entity, frequency), strict=True)]
    last = max(i for i, token in enumerate(tokens) if token is entity[-1])
    rest = tokens[last + 1 :]
    asks = re.search(r"\w{2}", "".join(token.text for token in rest)) is not None
    # the first token has no other part to be known by
    return sum(gains) / len(gains), min(scores[1:] or scores), sum(_logprobs(rest)) if asks else None


def _expected(tokens: Sequence[Token], frequency: Mapping[str, float] | None) -> list[float]:
    scored = [token for token in tokens if token.logprob is not None]
    if not frequency:
        return [0.0] * len(scored)
    rarest = min(frequency.values())
    return [frequency.get(token.text, rarest) for token in scored]


def _paraphrases(seen: Observation) -> dict[str, float | None]:
    """s5: how many paraphrases get the same answer, how probable it is under all wordings, and how they were read."""
    found: dict[str, float | None] = {}
    if seen.other_answers:
        same = plain(seen.answer)
        found["agreement"] = sum(plain(other) == same for other in seen.other_answers) / len(seen.other_answers)
    own = _logprobs(seen.answer_tokens)
    if seen.other_logprobs and own:
        each = [max(sum(own) / len(own), NO_CHANCE), *(max(score, NO_CHANCE) for score in seen.other_logprobs)]
        found["shared_logprob"] = math.log(sum(math.exp(score) for score in each) / len(each))
        found["worst_logprob"] = min(each)
    about = _name(seen)
    if seen.other_questions and about is not None:
        read = [read_question(tokens, about) for tokens in (seen.question_tokens or (), *seen.other_questions)]
        known = [familiarity for familiarity, _, _ in read if familiarity is not None]
        # of the paraphrases alone: an unusual wording of the question itself would look like a bad fit
        fits = [fit for _, _, fit in read[1:] if fit is not None]
        found["shared_familiarity"] = sum(known) / len(known) if known else None
        found["worst_fit"] = min(fits) if fits else None
    return found


def _recall(seen: Observation) -> float | None:
    """How well the entity is recalled from the answer, in nats per token: of a guess that fits nobody, badly."""
    about = _name(seen)
    if not seen.statement_tokens or about is None:
        return None
    return read_question(seen.statement_tokens, about)[0]


def _logprobs(tokens: Sequence[Token]) -> list[float]:
    return [max(token.logprob, NO_CHANCE) for token in tokens if token.logprob is not None]


def margin(top: Sequence[float]) -> float:
    """Nats between the likeliest token and the next (`top` best first, two at least)."""
    return top[0] - max(top[1], NO_CHANCE)


def entropy(top: Sequence[float]) -> float:
    """Entropy in nats of the likeliest tokens, the rest of the probability taken as one more outcome."""
    chances = [math.exp(score) for score in top]
    rest = max(0.0, 1.0 - sum(chances))
    return -sum(p * math.log(p) for p in (*chances, rest) if p > 0)


def semantic_entropy(samples: Sequence[str]) -> float:
    """-sum q ln q over clusters of answers that mean the same, here: that read the same once normalised; nats."""
    counts = Counter(plain(sample) for sample in samples)
    return -sum(n / len(samples) * math.log(n / len(samples)) for n in counts.values())


def plain(text: str) -> str:
    """Case, white space, outer punctuation and a leading article taken away, for comparing answers.

    >>> plain(' The  Old Mill. ')
    'old mill'
    """
    words = " ".join(text.casefold().replace("’", "'").split()).strip(" .,;:!?\"'`*()")
    return re.sub(r"^(?:the|a|an) ", "", words)


def lexical_support(question: str, answer: str, text: str, entity: str | None = None) -> float:
    """s8 from words alone, 0 to 1: in the best sentence of `text`, the share of the answer's words that occur, times
    the share of the entity's words that do.

    A sentence counts with the one before it, for a name is often given once. 0 for an answer without words.
    """
    wanted = _words(answer)
    names = [entity] if entity else entities(question)
    about = _words(max(names, key=len)) if names else set()
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    best = 0.0
    for before, sentence in zip(["", *sentences], sentences, strict=False):
        here = _words(sentence)
        held = len(wanted & here) / len(wanted) if wanted else 0.0
        named = len(about & (here | _words(before))) / len(about) if about else 1.0
        best = max(best, held * named)
    return best


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
