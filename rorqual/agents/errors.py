"""How a run can end other than well. A tool that fails is none of these: the model is told and goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rorqual.errors import RorqualError


class AgentError(RorqualError):
    """A run that cannot be started, resumed or gone on with."""


class InfraFailed(AgentError):
    """The platform, not the model, ended the run: it is masked from training and never scored as zero.

    evidence: what is known, as plain data; it also stands in the run's journal.
    """

    def __init__(self, message: str, evidence: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.evidence = dict(evidence or {})


class Preempted(AgentError):
    """The run was asked to stop and did, with everything recorded; `--resume` goes on where it was."""


class CallFailed(AgentError):
    """A tool refuses a call or could not do it, and nothing happened; the text goes to the model as the result."""
