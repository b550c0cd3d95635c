"""How sure an answer is: signals, a calibration of them for one model, and the decision to answer or to abstain.

>>> from rorqual.referee.confidence import promise
>>> promise([0.9, 0.5, 0.4, 0.2], alpha=0.25).threshold  # one wrong answer in four may be given
0.9
"""

from rorqual.referee.confidence.calibrator import Calibrator, fit
from rorqual.referee.confidence.conformal import Promise, promise
from rorqual.referee.confidence.decision import PROFILES, Band, Cascade, band_around, threshold_of
from rorqual.referee.confidence.engine_source import EngineSource
from rorqual.referee.confidence.estimate import CalibratedConfidence
from rorqual.referee.confidence.observation import Observation, Token, entities, from_chat_logprobs
from rorqual.referee.confidence.signals import SIGNALS, Signal, lexical_support, measure
from rorqual.referee.confidence.url_source import UrlSource, generic_paraphrases

__all__ = [
    "PROFILES",
    "SIGNALS",
    "Band",
    "CalibratedConfidence",
    "Calibrator",
    "Cascade",
    "EngineSource",
    "Observation",
    "Promise",
    "Signal",
    "Token",
    "UrlSource",
    "band_around",
    "entities",
    "fit",
    "from_chat_logprobs",
    "generic_paraphrases",
    "lexical_support",
    "measure",
    "promise",
    "threshold_of",
]
