"""Serving: token ids in, token events out. Text serves for stop strings only; messages and HTTP are above."""

from rorqual.engine.engine import Engine
from rorqual.engine.events import Completion, FinishReason, Timing, TokenEvent, TokenScore, Usage
from rorqual.engine.exactness import Exactness
from rorqual.engine.grammar import Grammar
from rorqual.engine.interfaces import LanguageModel, TextTokenizer
from rorqual.engine.params import SamplingParams
from rorqual.engine.request import Request
from rorqual.engine.settings import CacheSettings, EngineSettings
from rorqual.engine.stats import EngineStats, StepRecord
from rorqual.engine.trajectory import Trajectory

__all__ = [
    "CacheSettings",
    "Completion",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "Exactness",
    "FinishReason",
    "Grammar",
    "LanguageModel",
    "Request",
    "SamplingParams",
    "StepRecord",
    "TextTokenizer",
    "Timing",
    "TokenEvent",
    "TokenScore",
    "Trajectory",
    "Usage",
]
