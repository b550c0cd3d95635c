"""Quantisation-aware training in a run: from when on, what is rounded, and how much rounding costs.

Source: V4 report (FP4 quantisation-aware training of experts and of the indexer's query-key path). What is rounded how:
`model/quantised.py`.
"""

from rorqual import log
from rorqual.model import Transformer
from rorqual.model.quantised import (
    forget,
    is_quantised,
    quantisation_error,
    quantise,
    refuse_exchange,
    round_activations,
)
from rorqual.train.config import QatSection

logger = log.get(__name__)


class Qat:
    """The rounding of one run's model. Call `follow` before a step (and on resuming), `weights_moved` after it."""

    def __init__(self, model: Transformer, section: QatSection, total_tokens: int) -> None:
        """Raises: ConfigError for rounded inputs where experts are spread over processes."""
        self.model, self.section, self.total_tokens = model, section, total_tokens
        if section.mode != "none" and section.activations or model.cfg.activation_rounding == "v4-inputs":
            refuse_exchange(model)

    def of(self, model: Transformer) -> "Qat":
        """The same rounding for another model, such as the whole of one that was spread over processes."""
        return Qat(model, self.section, self.total_tokens)

    def follow(self, tokens: int) -> None:
        """Round weights and activations from the section's fraction of the tokens on. Raises: ConfigError when
        experts cannot be packed."""
        mode = self.section.mode
        if mode == "none" or tokens < self.section.start * self.total_tokens or is_quantised(self.model):
            return
        rounding = "v4-inputs" if self.section.activations else "v4"
        quantise(self.model, mode)
        round_activations(self.model, rounding)
        logger.info("From token %d on: experts in %s, activations %s.", tokens, mode, rounding)

    def weights_moved(self) -> None:
        """Forget rounded copies; the optimizer may have written where torch's version counters do not look."""
        forget(self.model)

    def record(self) -> dict[str, dict[str, float]]:
        """For metrics.jsonl: relative RMS error of the rounded weights by group; nothing before rounding begins."""
        if not is_quantised(self.model):
            return {}
        return {"quantisation_error": {k: round(v, 6) for k, v in quantisation_error(self.model).items()}}
