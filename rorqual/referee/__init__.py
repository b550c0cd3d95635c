"""Checks and cures for answers. Decides; speaks no HTTP."""

from rorqual.referee.answer import Answer, Asked, Call, read_answer, read_message
from rorqual.referee.continuity import Continuity, Restored
from rorqual.referee.hooks import Confidence, Retriever
from rorqual.referee.policy import Evidence, Options, Policy, load_policy, options_of
from rorqual.referee.referee import Referee
from rorqual.referee.verdict import Verdict

__all__ = [
    "Answer",
    "Asked",
    "Call",
    "Confidence",
    "Continuity",
    "Evidence",
    "Options",
    "Policy",
    "Referee",
    "Restored",
    "Retriever",
    "Verdict",
    "load_policy",
    "options_of",
    "read_answer",
    "read_message",
]
