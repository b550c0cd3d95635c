"""What a suite asks: a model loaded in this process, or a server behind a URL."""

from rorqual.evals.targets.base import Answer, Identity, Prompt, Target, TransportError

__all__ = ["Answer", "Identity", "Prompt", "Target", "TransportError"]
