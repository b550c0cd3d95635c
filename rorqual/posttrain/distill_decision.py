"""Teachers whose distribution a decision alters: "the model and a gate" as one teacher.

A gate decides about a whole answer, say to abstain with probability g; a student that is to do both in one pass needs
that as next-token distributions. So the teacher is the mixture of two writers, chosen once before the answer: with g
one that writes a set text (the refusal), with 1 - g the model. Its exact next-token distribution after y_<t is

    q'(v) = s_t r(v) + (1 - s_t) q(v),    s_t = P(the refusing writer | y_<t)

where r puts 1 - slack on the refusal's next id and slack on q, which keeps the divergence finite. s_t starts at g and
follows Bayes: it rises while the student writes the refusal, and falls to nothing as soon as it does not. Source:
evaluation specification, recipe R7 (distilling "model + gate" into the model).

T places of an answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Decision:
    """What a gate decided about one answer."""

    probability: float
    """Of writing `text` in place of what the model would."""
    text: tuple[int, ...]
    """Its ids, the end token included."""
    slack: float = 1e-3
    """What the refusing writer leaves to the model at each id."""

    def __post_init__(self) -> None:
        if not (0 <= self.probability <= 1 and 0 < self.slack < 1 and self.text):
            raise ConfigError(
                f"a decision with probability {self.probability}, slack {self.slack} and {len(self.text)} ids cannot "
                "be taught. Give a probability from 0 to 1, a slack between 0 and 1, and a text."
            )


def follow(decision: Decision, answer: Sequence[int], logprobs: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Share of the refusing writer before each id of an answer, fp32 [T], and the id that it puts next, int64 [T].

    logprobs: the teacher's own of the answer's ids. Where the writers agree the share is 0 and the id -1.
    """
    share, token = torch.zeros(len(answer)), torch.full((len(answer),), -1)
    odds = torch.logit(torch.tensor(decision.probability, dtype=torch.float64))
    slack = torch.tensor(decision.slack, dtype=torch.float64)
    for place, (written, logprob) in enumerate(zip(answer, logprobs, strict=True)):
        if place >= len(decision.text):
            break
        share[place], token[place] = torch.sigmoid(odds).float(), decision.text[place]
        if written != decision.text[place]:
            break  # from here on both write what the model would
        own = torch.tensor(logprob, dtype=torch.float64)
        odds = odds + torch.log1p(-slack + slack * own.exp()) - own
    return share, token


@dataclass(frozen=True)
class Altered:
    """The alteration of `distill.reverse_kl`'s rows that `follow` found."""

    share: Tensor
    """fp32 [R]."""
    token: Tensor
    """int64 [R], -1 where nothing is altered."""
    slack: float

    def alter(self, log_q: Tensor, rows: slice) -> Tensor:
        """fp32 [r, V] of the teacher alone -> of the mixture, in place."""
        share, token = self.share[rows].to(log_q.device), self.token[rows].to(log_q.device)
        share = torch.where(token < 0, 0.0, share)
        left = 1 - share * (1 - self.slack)  # of q at every id
        log_q += left.log().unsqueeze(-1)
        place = token.clamp_min(0).unsqueeze(-1)
        at = log_q.gather(-1, place)
        put = (share * (1 - self.slack)).log().unsqueeze(-1)
        log_q.scatter_(-1, place, torch.where(token.unsqueeze(-1) < 0, at, torch.logaddexp(at, put)))
        return log_q
