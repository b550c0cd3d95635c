"""From signals to the probability that the forced answer is right, fitted for one model on its calibration questions.

One boosted model per tier, each on the signals of that tier and those below, and an isotonic curve fitted on
predictions that never saw the entity they are about. Source: evaluation specification, section 7.2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rorqual.errors import ConfigError
from rorqual.referee.confidence import boosting, isotonic
from rorqual.referee.confidence.boosting import Boosted, Matrix
from rorqual.referee.confidence.isotonic import Curve
from rorqual.referee.confidence.signals import BY_NAME, SIGNALS

FORMAT = "rorqual-confidence"
VERSION = 1
FOLDS = 5
MIN_ITEMS = 30
_QUANTILES = 401

Signals = Mapping[str, float]


@dataclass(frozen=True)
class TierModel:
    """What decides when signals up to `tier` are there. chances: quantiles of its p over the calibration questions."""

    tier: int
    signals: tuple[str, ...]
    model: Boosted
    curve: Curve
    chances: tuple[float, ...]

    def p(self, rows: Sequence[Signals]) -> Matrix:
        """Probability that each answer is right [N]."""
        return self.curve(self.model.log_odds(matrix(rows, self.signals)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "tier": self.tier,
            "signals": list(self.signals),
            "model": self.model.to_dict(),
            "curve": [list(self.curve.scores), list(self.curve.chances)],
            "chances": list(self.chances),
        }

    @staticmethod
    def from_dict(record: dict[str, Any]) -> TierModel:
        curve = Curve(tuple(record["curve"][0]), tuple(record["curve"][1]))
        signals, chances = tuple(record["signals"]), tuple(record["chances"])
        return TierModel(int(record["tier"]), signals, Boosted.from_dict(record["model"]), curve, chances)


@dataclass(frozen=True)
class Calibrator:
    """A fitted confidence. It is valid for the model it was fitted on, which `model_sha` names, and no other.

    means: of every signal over the calibration questions. training_hash: of those questions' signals and outcomes.
    measured: figures about it, such as AUROC and ECE, from whoever evaluated it. frequency: see `signals.measure`.
    """

    model_sha: str
    tiers: tuple[TierModel, ...]
    means: dict[str, float]
    training_hash: str
    num_items: int
    measured: dict[str, float] = field(default_factory=dict)
    frequency: dict[str, float] = field(default_factory=dict)

    def p(self, rows: Sequence[Signals], tier: int | None = None) -> Matrix:
        """Probability that each answer is right [N], by the model of `tier` (of the highest, unless given)."""
        return self.at(tier).p(rows)

    def at(self, tier: int | None = None) -> TierModel:
        """The model of the highest tier that is not above `tier`."""
        return [t for t in self.tiers if tier is None or t.tier <= tier][-1]

    def with_measured(self, **figures: float) -> Calibrator:
        return replace(self, measured={**self.measured, **figures})

    def save(self, path: str | Path) -> Path:
        """Write the artefact as JSON."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "model_sha": self.model_sha,
            "training_hash": self.training_hash,
            "num_items": self.num_items,
            "measured": self.measured,
            "means": self.means,
            "frequency": self.frequency,
            "tiers": [tier.to_dict() for tier in self.tiers],
        }
        path = Path(path)
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def load(path: str | Path, *, model_sha: str) -> Calibrator:
        """Read an artefact for the model called `model_sha`.

        Raises: ConfigError when the file is none, of another version, or was fitted on another model.
        """
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            kind, version = record["format"], record["version"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} is no calibration ({type(error).__name__}: {error}), so no confidence can be told. Make one "
                "with `rorqual referee calibrate`."
            ) from error
        if (kind, version) != (FORMAT, VERSION):
            raise ConfigError(
                f"{path} is {kind!r} of version {version!r}; this release reads {FORMAT!r} of version {VERSION}. "
                "Calibrate again."
            )
        if record["model_sha"] != model_sha:
            raise ConfigError(
                f"{path} was fitted on the model {record['model_sha']}, but the model asked is {model_sha}. Confidence "
                "does not carry over from one model to another. Calibrate again for this one."
            )
        tiers = tuple(TierModel.from_dict(one) for one in record["tiers"])
        return Calibrator(
            model_sha, tiers, record["means"], record["training_hash"], record["num_items"], record["measured"],
            record["frequency"],
        )  # fmt: skip


def fit(
    rows: Sequence[Signals],
    right: Sequence[bool],
    *,
    model_sha: str,
    groups: Sequence[Hashable] | None = None,
    names: Sequence[str] | None = None,
    frequency: Mapping[str, float] | None = None,
    rounds: int = 300,
) -> Calibrator:
    """Fit to the signals of calibration questions and whether each forced answer was right.

    groups: the entity or document each question is about; questions of one entity are never on both sides of a fold.
    names: signals to use (all there are, unless given). A signal measured for fewer than half of the questions is
    left out. Raises: ConfigError for fewer than 30 questions, or when all are right or all wrong.
    """
    if len(rows) < MIN_ITEMS or len(rows) != len(right):
        raise ConfigError(
            f"{len(rows)} calibration questions with {len(right)} outcomes cannot be fitted. Give at least "
            f"{MIN_ITEMS}, each with its outcome; some hundred are needed for a useful threshold."
        )
    y = np.asarray(right, dtype=np.bool_)
    boosting.check_outcomes(y)
    used = [s for s in SIGNALS if (names is None or s.name in names) and _is_common(rows, s.name)]
    if not used:
        raise ConfigError(
            "None of the calibration questions has a signal of confidence. The model's server gave neither log "
            "probabilities nor further answers. Ask one that sends logprobs, or allow paraphrases and samples."
        )
    folds = _folds(len(rows) if groups is None else groups, len(rows))
    tiers = []
    for tier in sorted({signal.tier for signal in used}):
        chosen = [signal for signal in used if signal.tier <= tier]
        tiers.append(_fit_tier(tier, [s.name for s in chosen], rows, y, folds, rounds))
    means = {s.name: float(np.nanmean(matrix(rows, [s.name]))) for s in used}
    items = [[dict(row), bool(outcome)] for row, outcome in zip(rows, right, strict=True)]
    digest = hashlib.sha256(json.dumps(items, sort_keys=True).encode())
    return Calibrator(
        model_sha, tuple(tiers), means, digest.hexdigest()[:16], len(rows), frequency=dict(frequency or {})
    )


def _fit_tier(
    tier: int,
    names: list[str],
    rows: Sequence[Signals],
    y: npt.NDArray[np.bool_],
    folds: npt.NDArray[np.intp],
    rounds: int,
) -> TierModel:
    data, rises = matrix(rows, names), [BY_NAME[name].rises for name in names]
    odds = np.empty(len(y))
    for fold in range(FOLDS):
        out = folds == fold
        if out.any():
            odds[out] = boosting.fit(data[~out], y[~out], rises, rounds=rounds).log_odds(data[out])
    curve = isotonic.fit(odds, y)
    chances = np.quantile(curve(odds), np.linspace(0, 1, _QUANTILES))
    model = boosting.fit(data, y, rises, rounds=rounds)
    return TierModel(tier, tuple(names), model, curve, tuple(float(c) for c in chances))


def matrix(rows: Sequence[Signals], names: Sequence[str]) -> Matrix:
    """Signals as float64 [N, F]; NaN where one was not measured."""
    return np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=np.float64).reshape(
        len(rows), len(names)
    )


def _is_common(rows: Sequence[Signals], name: str) -> bool:
    return 2 * sum(name in row for row in rows) >= len(rows)


def _folds(groups: int | Sequence[Hashable], count: int) -> npt.NDArray[np.intp]:
    """A fold per question [N], by a hash of its group, so that the same questions always fall the same way."""
    keys = range(groups) if isinstance(groups, int) else groups
    digests = (hashlib.sha256(str(key).encode()).digest()[0] % FOLDS for key in keys)
    return np.fromiter(digests, dtype=np.intp, count=count)
