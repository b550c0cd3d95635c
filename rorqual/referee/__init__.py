"""Checks and cures for answers. Decides; speaks no HTTP."""

from rorqual.referee.continuity import Continuity, Restored

__all__ = ["Continuity", "Restored"]
