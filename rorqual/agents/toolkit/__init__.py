"""The tools' side inside the sandbox: one zip file with a small program and the pure-Python packages it needs.

Documents are parsed there and never in this process: a crafted PDF meets the sandbox's walls, not the host's.
"""

from rorqual.agents.toolkit.archive import FOLDER, Toolkit, build_toolkit

__all__ = ["FOLDER", "Toolkit", "build_toolkit"]
