"""Fit a confidence to an endpoint on somebody's own labelled questions, and say how good it is.

The set is JSON Lines, a question each:

    {"question": "Where was Ada Byron born?", "answer": "Oslo", "group": "Ada Byron"}
    {"question": "Where was Orlo Pisk born?", "answer": null}

`answer` is the right one, a list of ways to write it, or null where nobody can know. Optional: `group` (questions of
one entity or document, which stay on one side of every split), `entity` (what the question is about) and
`paraphrases` (other wordings). Half of the groups fit the calibrator; the other half, which it never saw, measures it
and sets the conformal thresholds. The model has to answer every question, so the system prompt asks for its best
guess; questions that it declines all the same are left out and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.data.tasks.answers import is_abstention
from rorqual.errors import DataError
from rorqual.evals import metrics
from rorqual.referee.confidence import (
    CalibratedConfidence,
    Calibrator,
    Promise,
    UrlSource,
    fit,
    generic_paraphrases,
    measure,
    promise,
)
from rorqual.referee.confidence.signals import plain

FORCED = "Give the answer alone, in as few words as possible. If you are not sure, give your best guess."
ALPHAS = (0.05, 0.10)
CONCURRENT = 8


@dataclass(frozen=True)
class Labelled:
    """One question with its right answers (none: it has no answer)."""

    question: str
    answers: tuple[str, ...]
    group: Hashable
    entity: str | None = None
    paraphrases: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether `answer` reads as one of the right ones, case, outer punctuation and articles aside."""
        return plain(answer) in {plain(one) for one in self.answers}


@dataclass(frozen=True)
class Calibration:
    """A calibrator, its promises, and figures on the half of the questions that it was not fitted on."""

    calibrator: Calibrator
    promises: tuple[Promise, ...]
    figures: dict[str, float | None]
    num_declined: int
    calls: int


def read_labelled(path: str | Path) -> list[Labelled]:
    """The questions of a JSON Lines file. Raises: DataError naming the line that is none."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the labelled questions of {path}: {error}. Check the path.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_labelled(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path}, line {number} is no labelled question ({type(error).__name__}: {error}). It is an object "
                    'such as {"question": "...", "answer": "..."}; answer null says that nobody can know.'
                ) from error
    return found


def _labelled(record: dict[str, Any]) -> Labelled:
    question, answer = record["question"], record["answer"]
    answers = () if answer is None else (answer,) if isinstance(answer, str) else tuple(answer)
    texts = (question, *answers, *record.get("paraphrases", ()))
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("question, answer and paraphrases must be text that is not empty")
    group = record.get("group", record.get("entity", question))
    return Labelled(question, answers, str(group), record.get("entity"), tuple(record.get("paraphrases", ())))


async def calibrate(
    source: UrlSource,
    questions: Sequence[Labelled],
    *,
    paraphrases: int = 3,
    samples: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Ask everything once, fit on one half of the groups, measure on the other.

    source: its `system` should demand an answer (`FORCED`). Raises: RequestError of the endpoint, ConfigError when
    there is too little to fit.
    """
    gate, done = asyncio.Semaphore(CONCURRENT), 0

    async def ask(one: Labelled) -> tuple[dict[str, float], bool, bool]:
        nonlocal done
        async with gate:
            seen = await source.answer(one.question, one.entity)
            if paraphrases:
                wordings = one.paraphrases or generic_paraphrases(one.question)
                seen = await source.paraphrased(seen, wordings[:paraphrases])
            if samples:
                seen = await source.sampled(seen, samples)
        done += 1
        progress(done, len(questions))
        return measure(seen), one.is_right(seen.answer), is_abstention(seen.answer)

    found = await asyncio.gather(*(ask(one) for one in questions))
    kept = [(one, row, right) for one, (row, right, declined) in zip(questions, found, strict=True) if not declined]
    halves: tuple[list[tuple[Labelled, dict[str, float], bool]], ...] = ([], [])
    for item in kept:
        halves[hashlib.sha256(str(item[0].group).encode()).digest()[-1] % 2].append(item)
    fitting, held = halves
    calibrator = fit(
        [row for _, row, _ in fitting],
        [right for _, _, right in fitting],
        model_sha=identity(source.url, source.model),
        groups=[one.group for one, _, _ in fitting],
    )
    p = calibrator.p([row for _, row, _ in held])
    right = [y for _, _, y in held]
    wrong = [float(chance) for chance, y in zip(p, right, strict=True) if not y]
    figures = {
        "auroc": metrics.auroc(p, right),
        "ece": metrics.expected_calibration_error(p, right),
        "brier": metrics.brier(p, right),
        "aurc": metrics.aurc(p, right),
        "accuracy": metrics.share(sum(right), len(right)),
        "held_out": float(len(right)),
    }
    calibrator = calibrator.with_measured(**{k: v for k, v in figures.items() if v is not None})
    made = tuple(promise(wrong, alpha) for alpha in ALPHAS)
    return Calibration(calibrator, made, figures, len(questions) - len(kept), source.calls)


def confidence_for(file: Path, url: str, model: str, *, key: str | None, profile: str) -> CalibratedConfidence:
    """A saved calibration at work for its endpoint. Raises: ConfigError when it is none, or another's."""
    calibrator = Calibrator.load(file, model_sha=identity(url, model))
    return CalibratedConfidence(calibrator, UrlSource(url, model, key), profile=profile)


def identity(url: str, model: str) -> str:
    """What a calibration for an endpoint is bound to: its address and the model's name there.

    A host that changes the weights behind a name cannot be noticed by this; calibrate again after it says so.
    """
    return hashlib.sha256(f"{url.rstrip('/').removesuffix('/v1')}\n{model}".encode()).hexdigest()[:16]
