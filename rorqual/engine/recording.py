"""What a token was drawn from, for training: the policy is the filtered distribution, not the model's own.

A trainer that scores a token with another temperature, or over ids that the sampler had removed, divides by the
probability of something that could not happen. Source: training specification, section 12.4 (Keep Sampling Mask); V3.2
report.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.params import SamplingParams


def drawn_from(logits_V: Tensor, params: SamplingParams, token: int) -> tuple[float, NDArray[np.int32] | None]:
    """The log probability of `token` under the distribution it was drawn from, and that distribution's support.

    The support is the ids of probability above zero, ascending; None where nothing was removed. A greedy choice
    (temperature 0) is scored under the model itself, and its support is the one id.
    Shapes: logits [V], any float type.
    """
    if params.temperature == 0:
        return float(torch.log_softmax(logits_V.double(), dim=-1)[token]), np.array([token], dtype=np.int32)
    if params.suppressed:
        logits_V = logits_V.float().index_fill(0, params.suppress_index.to(logits_V.device), float("-inf"))
    if params.top_k is None and params.top_p == 1 and params.min_p == 0:
        logprob = float(torch.log_softmax(logits_V.double() / params.temperature, dim=-1)[token])
        if not params.suppressed:
            return logprob, None
        return logprob, _ids(logits_V > -torch.inf)
    probs_V = sampler.filtered_probabilities(logits_V, params)
    return math.log(float(probs_V[token])), _ids(probs_V > 0)


def _ids(kept_V: Tensor) -> NDArray[np.int32]:
    ids: NDArray[np.int32] = kept_V.nonzero()[:, 0].numpy().astype(np.int32)
    return ids
