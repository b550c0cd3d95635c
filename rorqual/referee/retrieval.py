"""Texts of a folder as a retriever, and whether what was retrieved supports an answer.

An answer that was too unsure is asked for again with what was found; it is given only when the texts found support it,
since a model is no surer of what it was shown than its log probabilities say. Source: the specification, 7.3 and 7.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rorqual.errors import ConfigError
from rorqual.referee.answer import Answer, Asked
from rorqual.referee.claims import Claim
from rorqual.referee.judge import Judge, Question, Tally
from rorqual.referee.policy import Evidence
from rorqual.referee.sources import Sentence, SourceIndex, denies, words_of

SUFFIXES: Final = (".txt", ".md", ".rst")
MOST_FOUND: Final = 5
_MOST_SENTENCES = 1_000_000
_NAME = re.compile(r"(?<!^)(?<![.!?]\s)\b[A-ZÀ-Þ][\w'’-]*")
_LAST = 2000


class FolderRetriever:
    """Text files below a folder, by their words; read once. Raises: ConfigError where there are none."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise ConfigError(f"{folder} holds no texts ({', '.join(SUFFIXES)}). Give a folder with sources.")
        texts = [Evidence(str(one.relative_to(folder)), one.read_text("utf-8", errors="replace")) for one in files]
        self._index = SourceIndex(texts, _MOST_SENTENCES)

    async def retrieve(self, request: Asked, answer: Answer) -> Sequence[Evidence]:
        """The sentences nearest to the question that have its names, or half of what its words weigh."""
        question = last_part(request.question)
        words = words_of(question)
        names = names_in(question)
        weight = sum(map(self._index.weight, set(words)))
        found: dict[str, list[str]] = {}
        for one in self._index.nearest(words, None, MOST_FOUND):
            shared = sum(self._index.weight(word) for word in set(words) & one.stems)
            if names <= one.stems if names else shared >= weight / 2:
                found.setdefault(one.source, []).append(one.text)
        return [Evidence(source, "\n".join(texts)) for source, texts in found.items()]


async def is_supported(
    asked: Asked, answer: Answer, evidence: Sequence[Evidence], judge: Judge | None, tally: Tally, *, votes: int = 1
) -> bool:
    """Whether the texts say the answer: one sentence has its words and the question's names, or the judge says so.

    votes: more than one asks the judge both ways. Raises: RequestError where the judge cannot be asked.
    """
    question, content = last_part(asked.question), (answer.content or "").strip()
    index = SourceIndex(evidence)
    known = set(words_of(question))
    words = words_of(content)
    news = [word for word in words if word not in known]
    near = index.nearest([*words, *known], None, MOST_FOUND)
    if news and any(_says(one, news, names_in(question), content) for one in near):
        return True
    if judge is None or not content or not near:
        return False
    asks = [Question(Claim(f"The answer to `{question[-400:]}` is: {content[:1000]}", (0, 0)), near)]
    for turn in range(2 if votes > 1 else 1):
        (opinion,) = await judge.opinions(question, asks, tally, turn=turn)
        if opinion is None or opinion.support != "supported":
            return False
    return True


def _says(sentence: Sentence, news: Sequence[str], names: frozenset[str], content: str) -> bool:
    has_all = all(word in sentence.stems for word in news) and names <= sentence.stems
    return has_all and sentence.denies == denies(content)


def last_part(question: str) -> str:
    """The question itself, behind texts that stand before it."""
    return question.strip().rpartition("\n\n")[2][-_LAST:]


def names_in(question: str) -> frozenset[str]:
    """Stems of capitalised words within sentences."""
    return frozenset(word for name in _NAME.findall(question) for word in words_of(name))
