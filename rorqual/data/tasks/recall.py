"""Recall at a distance, densely: documents that train copying from far back with many graded tokens each.

A needle document of 8,000 tokens has a dozen tokens to learn from. Here one text is asked many questions (chat mode),
or repeated whole, so that a good part of its tokens are targets that can only be had from far behind. Items and
grading are those of `needle`, at lengths up to 0.6 of a row; keys are split as there.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from rorqual.data.tasks import words
from rorqual.data.tasks.base import Piece, Turn, maybe_system, render_document, turns_to_messages
from rorqual.data.tasks.needle import VALUE_KINDS, Needle, NeedleFamily, draw_values, estimate_tokens
from rorqual.data.tasks.world import World

RECALL_ROWS: dict[str, int] = {"recall": 512, "recall-2k": 2048, "recall-8k": 8192}
"""Tokens of the rows that each family's documents are made for."""

_SHARES = (0.15, 0.25, 0.35, 0.45, 0.6)  # of a row, that a text takes
_QUESTION_TOKENS = 34  # a question with its answer, at most
_OVERHEAD = 48
_REPEATS = ("Repeat the text.", "Say that again, word for word.", "Copy the text exactly.", "Write it once more.")
_LABELS = ("code", "secret", "key", "password", "label")


class RecallFamily(NeedleFamily):
    """Needles, many to a text, and whole texts repeated, in documents that fit into rows of `row` tokens."""

    version = "1"
    partition = "needle"

    def __init__(
        self,
        world: World,
        *,
        name: str = "recall",
        row: int | None = None,
        count_tokens: Callable[[str], int] = estimate_tokens,
    ) -> None:
        self.row = RECALL_ROWS[name] if row is None else row
        lengths = tuple(int(share * self.row) for share in _SHARES)
        super().__init__(world, lengths=lengths, count_tokens=count_tokens)
        self.name = name

    def train_document(self, rng: random.Random) -> list[Piece]:
        """Many questions about one text (55 %), a text to repeat (15 %), or a needle document (30 %)."""
        roll = rng.random()
        if roll < 0.3:
            return super().train_document(rng)
        length = rng.choice(self.lengths)
        turns = self._repetition(rng, length) if roll < 0.45 else self._questions(rng, length)
        return render_document(turns_to_messages(turns, mode="chat", system=maybe_system(rng)), mode="chat")

    def _questions(self, rng: random.Random, length: int) -> list[Turn]:
        """A text with pairs among plain lines, and questions about pairs at all its depths."""
        plain = rng.choice((0.0, 0.3, 0.7))
        lines: list[str] = []
        needles: list[Needle] = []
        seen: set[str] = set()
        used = 0
        while used < length or not needles:
            if rng.random() < plain:
                line = " ".join(rng.choices(words.FILLER, k=rng.randint(6, 12)))
            else:
                while (key := self._keys(rng, "train", 1)[0]) in seen:
                    pass
                seen.add(key)
                needles.append(Needle(key, draw_values(rng, rng.choice(VALUE_KINDS), 1)[0], rng.choice(_LABELS)))
                line = needles[-1].line()
            lines.append(line)
            used += self.count_tokens(line)
        room = (self.row - int(1.2 * used) - _OVERHEAD) // _QUESTION_TOKENS  # texts run over their estimate at times
        asked = rng.sample(needles, max(1, min(len(needles), room)))
        first, *rest = [Turn(n.question(), "", n.answer()) for n in asked]
        return [Turn("\n".join(lines) + f"\n\n{first.user}", "", first.answer), *rest]

    def _repetition(self, rng: random.Random, length: int) -> list[Turn]:
        """A text of half the length, so that prompt and repetition fill it."""
        lines: list[str] = []
        used = 0
        while used < length // 2:
            kind = rng.choice(("words", "invented", "values"))
            if kind == "words":
                line = " ".join(rng.choices(words.FILLER, k=rng.randint(4, 10)))
            elif kind == "invented":
                line = " ".join(words.invented_word(rng, rng.choice((2, 3))) for _ in range(rng.randint(2, 5)))
            else:
                line = " ".join(draw_values(rng, rng.choice(VALUE_KINDS), rng.randint(1, 3)))
            lines.append(line)
            used += self.count_tokens(line)
        text = "\n".join(lines)
        return [Turn(f"{text}\n\n{rng.choice(_REPEATS)}", "", text)]
