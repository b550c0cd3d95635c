"""Observations from an engine in this process: answers, paraphrases, samples and self-checks as batches of requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rorqual.chat import encode_messages
from rorqual.engine import Completion, Engine, SamplingParams, TokenScore
from rorqual.referee.confidence.observation import Observation, Token
from rorqual.tokenizer import Tokenizer

Message = Mapping[str, Any]

TOP = 20
SELF_CHECK = "Question: {question}\nProposed answer: {answer}\nIs the proposed answer right? Answer yes or no."
ABSTENTION_CLAUSE = "If you do not know the answer, say: I don't know."
ABSTENTIONS = ("I don't know", "I do not know", "I'm not sure", "I am not sure", "Unknown")


class EngineSource:
    """Questions to a model in chat mode, without thinking; `system` stands before each.

    The engine's model must be the one the calibration is for.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, system: str | None = None, max_tokens: int = 64
    ) -> None:
        self._engine, self._tokenizer, self._system = engine, tokenizer, system
        self._max_tokens = max_tokens

    def answer(self, questions: Sequence[str], entities: Sequence[str | None] | None = None) -> list[Observation]:
        """Greedy answers, with the log probabilities of question and answer. Raises: RequestError as the engine."""
        params = self._params(temperature=0.0, prompt_logprobs=True)
        done = self._engine.generate([self._prompt(question) for question in questions], params)
        named = entities or [None] * len(questions)
        return [
            Observation(
                question=question,
                answer=completion.text,
                answer_tokens=self._written(completion),
                question_tokens=self._read(completion.prompt_scores or ()),
                entity=entity,
            )
            for question, entity, completion in zip(questions, named, done, strict=True)
        ]

    def paraphrased(self, seen: Sequence[Observation], wordings: Sequence[Sequence[str]]) -> list[Observation]:
        """s5: each answer as the answer to other wordings of its question, by reading it there; nothing is generated.

        Where greedy decoding would write the same answer, that answer is noted, else an empty one.
        """
        prompts = [
            (self._prompt(w), self._encode(one.answer)) for one, ws in zip(seen, wordings, strict=True) for w in ws
        ]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=True, top_logprobs=1, prompt_logprobs=True)
        done = self._engine.generate([[*prompt, *answer] for prompt, answer in prompts], params)
        results = []
        for (prompt, answer), completion in zip(prompts, done, strict=True):
            scores = (completion.prompt_scores or ())[len(prompt) : len(prompt) + len(answer)]
            mean = sum(s.logprob or 0.0 for s in scores) / max(len(scores), 1)
            same = bool(scores) and all(s.top_logprobs[0][0] == s.id for s in scores)
            results.append((mean, same, self._read((completion.prompt_scores or ())[: len(prompt)])))
        out, at = [], 0
        for one, ws in zip(seen, wordings, strict=True):
            own, at = results[at : at + len(ws)], at + len(ws)
            out.append(
                replace(
                    one,
                    other_logprobs=tuple(mean for mean, _, _ in own),
                    other_questions=tuple(read for _, _, read in own),
                    other_answers=tuple(one.answer if same else "" for _, same, _ in own),
                )
            )
        return out

    def recalled(self, seen: Sequence[Observation], statements: Sequence[str]) -> list[Observation]:
        """The reverse: plain sentences, answer first and entity behind it, read without any chat format."""
        rows = [[self._tokenizer.bos_token_id, *self._encode(text)] for text in statements]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=True, prompt_logprobs=True)
        done = self._engine.generate(rows, params)
        return [
            replace(one, statement_tokens=self._read(completion.prompt_scores or ()))
            for one, completion in zip(seen, done, strict=True)
        ]

    def sampled(self, seen: Sequence[Observation], count: int, seed: int = 0) -> list[Observation]:
        """s6: `count` answers of each question at temperature 1."""
        prompts = [self._prompt(one.question) for one in seen for _ in range(count)]
        params = [self._params(temperature=1.0, seed=seed + i) for i in range(len(prompts))]
        texts = [completion.text for completion in self._engine.generate(prompts, params)]
        return [replace(one, samples=tuple(texts[i * count : (i + 1) * count])) for i, one in enumerate(seen)]

    def checked(self, seen: Sequence[Observation]) -> list[Observation]:
        """s4 and s7: P(True) of each answer, and the probability of an abstention when the prompt allows one."""
        asked = [SELF_CHECK.format(question=one.question, answer=one.answer) for one in seen]
        yes = self._mass([self._prompt(text) for text in asked], ["Yes", "yes"])
        no = self._mass([self._prompt(text) for text in asked], ["No", "no"])
        allowed = [self._prompt(f"{one.question} {ABSTENTION_CLAUSE}") for one in seen]
        abstains = self._mass(allowed, ABSTENTIONS)
        return [
            replace(one, p_true=y / (y + n) if y + n > 0 else None, abstain_mass=min(mass, 1.0))
            for one, y, n, mass in zip(seen, yes, no, abstains, strict=True)
        ]

    def _mass(self, prompts: Sequence[list[int]], texts: Sequence[str]) -> list[float]:
        """The probability, for each prompt, that the answer begins with one of `texts`; those that agree count once."""
        ways = sorted({tuple(self._encode(text)) for text in texts})
        ways = [way for way in ways if not any(other != way and way[: len(other)] == other for other in ways)]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=True, prompt_logprobs=True)
        whole = [[*prompt, *way] for prompt in prompts for way in ways]
        chances: list[float] = []
        for completion, row in zip(self._engine.generate(whole, params), whole, strict=True):
            at = len(chances) % len(ways)
            scores = (completion.prompt_scores or ())[len(row) - len(ways[at]) :]
            chances.append(math.exp(sum(score.logprob or 0.0 for score in scores)))
        return [sum(chances[i : i + len(ways)]) for i in range(0, len(chances), len(ways))]

    def _prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        return self._tokenizer.encode(encode_messages(messages, thinking_mode="chat"))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allow_special=False)

    def _params(self, *, temperature: float, seed: int | None = None, prompt_logprobs: bool = False) -> SamplingParams:
        return SamplingParams(
            temperature=temperature, seed=seed, max_tokens=self._max_tokens, logprobs=True, top_logprobs=TOP,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip

    def _written(self, completion: Completion) -> tuple[Token, ...]:
        control = self._tokenizer.control_token_ids
        logprobs, tops = completion.logprobs or (), completion.top_logprobs or ()
        return tuple(
            Token(self._tokenizer.decode([i]), logprob, tuple(score for _, score in top))
            for i, logprob, top in zip(completion.ids, logprobs, tops, strict=True)
            if i not in control
        )

    def _read(self, scores: Sequence[TokenScore]) -> tuple[Token, ...]:
        control = self._tokenizer.control_token_ids
        return tuple(Token(self._tokenizer.decode([s.id]), s.logprob) for s in scores if s.id not in control)
