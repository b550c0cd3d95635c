"""Forced answers and their log probabilities for many short questions at once, by whole forward passes.

The engine does the same one request at a time (`EngineSource`, and `tests/unit/test_confidence_sources.py` holds both
to one result); for forty thousand questions of twenty tokens a padded batch is several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rorqual.chat import encode_messages
from rorqual.model import Transformer
from rorqual.referee.confidence import Observation, Token
from rorqual.tokenizer import EOS, Tokenizer

BATCH_TOKENS = 4096
TOP = 20
Reading = tuple[float, bool, tuple[Token, ...]]


class Batches:
    """A model and its tokenizer, asked in chat mode without a system prompt."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, max_tokens: int = 8) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self._eos = tokenizer.token_id(EOS)
        self._texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question, up to where the answer begins."""
        return self.tokenizer.encode(encode_messages([{"role": "user", "content": question}], thinking_mode="chat"))

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], entities: Sequence[str]) -> list[Observation]:
        """Greedy answers with everything the free signals need."""
        prompts = [self.prompt(question) for question in questions]
        answers: list[list[Token]] = [[] for _ in prompts]
        read: list[tuple[Token, ...]] = [()] * len(prompts)
        for places in self._of_one_length(prompts):
            state = self.model.new_state(len(places))
            logprobs = self._logprobs(self.model(torch.tensor([prompts[at] for at in places]), state=state))
            for row, at in enumerate(places):
                read[at] = self._read(prompts[at], logprobs[row])
            running = set(places)
            for step in range(self.max_tokens):
                best, ids = logprobs[:, -1].topk(TOP)
                for at, scores, token in zip(places, best.tolist(), ids[:, 0].tolist(), strict=True):
                    if token == self._eos:
                        running.discard(at)
                    elif at in running:
                        answers[at].append(Token(self._texts[token], scores[0], tuple(scores)))
                if not running or step == self.max_tokens - 1:
                    break
                logprobs = self._logprobs(self.model(ids[:, :1], state=state))
        return [
            Observation(
                question=question,
                answer="".join(token.text for token in tokens),
                answer_tokens=tuple(tokens),
                question_tokens=seen,
                entity=entity,
            )
            for question, entity, tokens, seen in zip(questions, entities, answers, read, strict=True)
        ]

    @torch.inference_mode()
    def score(self, questions: Sequence[str], answers: Sequence[str]) -> list[Reading]:
        """For each given answer, its mean log probability per token, whether greedy decoding would write it, and the
        question's tokens as read.
        """
        prompts = [self.prompt(question) for question in questions]
        whole = [p + self.tokenizer.encode(a, allow_special=False) for p, a in zip(prompts, answers, strict=True)]
        found: list[Reading] = [(0.0, False, ())] * len(whole)
        for places, logprobs in self._forward(list(range(len(whole))), whole):
            for row, at in enumerate(places):
                begin, ids = len(prompts[at]), torch.tensor(whole[at])
                if len(ids) == begin:
                    continue
                there = logprobs[row, begin - 1 : len(ids) - 1]
                own = there.gather(1, ids[begin:, None])[:, 0]
                same = bool((there.argmax(1) == ids[begin:]).all())
                found[at] = float(own.mean()), same, self._read(prompts[at], logprobs[row])
        return found

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> list[tuple[Token, ...]]:
        """The tokens of plain texts, as documents of their own."""
        begin = self.tokenizer.bos_token_id
        rows = [[begin, *self.tokenizer.encode(text, allow_special=False)] for text in texts]
        found: list[tuple[Token, ...]] = [()] * len(rows)
        for places, logprobs in self._forward(list(range(len(rows))), rows):
            for row, at in enumerate(places):
                found[at] = self._read(rows[at], logprobs[row])
        return found

    @torch.inference_mode()
    def samples(self, questions: Sequence[str], count: int, seed: int) -> list[list[str]]:
        """`count` answers of each question at temperature 1."""
        generator = torch.Generator().manual_seed(seed)
        prompts = [self.prompt(question) for question in questions for _ in range(count)]
        texts = ["" for _ in prompts]
        for places in self._of_one_length(prompts):
            state, running = self.model.new_state(len(places)), set(places)
            logprobs = self._logprobs(self.model(torch.tensor([prompts[at] for at in places]), state=state))
            for _ in range(self.max_tokens):
                drawn = torch.multinomial(logprobs[:, -1].exp(), 1, generator=generator)
                for at, token in zip(places, drawn[:, 0].tolist(), strict=True):
                    if token == self._eos:
                        running.discard(at)
                    elif at in running:
                        texts[at] += self._texts[token]
                if not running:
                    break
                logprobs = self._logprobs(self.model(drawn, state=state))
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def _of_one_length(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Batches of places whose rows are equally long."""
        lengths: dict[int, list[int]] = {}
        for at, row in enumerate(rows):
            lengths.setdefault(len(row), []).append(at)
        for length, places in sorted(lengths.items()):
            size = max(1, BATCH_TOKENS // length)
            yield from (places[i : i + size] for i in range(0, len(places), size))

    def _logprobs(self, logits_BTV: Tensor) -> Tensor:
        """Log probabilities of the tokens that have a text."""
        return logits_BTV.float()[..., : self.tokenizer.vocab_size].log_softmax(-1)

    def _forward(self, places: list[int], rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of places and log probabilities [B, T, V] of their rows, padded on the right."""
        order = sorted(places, key=lambda at: len(rows[at]))
        start = 0
        while start < len(order):
            batch: list[int] = []
            while start < len(order) and (not batch or len(rows[order[start]]) * (len(batch) + 1) <= BATCH_TOKENS):
                batch.append(order[start])
                start += 1
            width = max(len(rows[at]) for at in batch)
            tokens = torch.tensor([rows[at] + [self._eos] * (width - len(rows[at])) for at in batch])
            yield batch, self._logprobs(self.model(tokens, lengths=[len(rows[at]) for at in batch]))

    def _read(self, ids: list[int], logprobs_TV: Tensor) -> tuple[Token, ...]:
        """The question's tokens as read, without the control tokens around them."""
        own = logprobs_TV[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        control = self.tokenizer.control_token_ids
        return tuple(
            Token(self._texts[token], score) for token, score in zip(ids[1:], own, strict=True) if token not in control
        )
