"""The network. `Transformer` computes logits, `State` remembers a sequence, `Trace` records what happened inside."""

from rorqual.model.init import init_weights
from rorqual.model.layout import Layout
from rorqual.model.mtp import next_tokens
from rorqual.model.scores import Scores
from rorqual.model.segments import Segment
from rorqual.model.state import State
from rorqual.model.trace import RouterRecord, Trace
from rorqual.model.transformer import Transformer

__all__ = [
    "Layout",
    "RouterRecord",
    "Scores",
    "Segment",
    "State",
    "Trace",
    "Transformer",
    "init_weights",
    "next_tokens",
]
