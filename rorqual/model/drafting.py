"""Drafts of a sequence's next tokens by the MTP module, for speculative decoding (V3 report section 2.2).

Row i of the module joins the trunk's streams of token i with token i + 1 and predicts token i + 2; for further drafts
it reads its own streams in place of the trunk's and its own draft as the next token. What it remembers of a sequence is
its window, kept here and not in the `State`: nothing that the trunk computes depends on a draft, so a memory that
starts in the middle of a text (behind cached tokens, after a pause) makes drafts worse for a while and changes nothing
else. A model with several modules drafts with the first.

n rows, N streams, D hidden.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.model import decode
from rorqual.model.decode_memory import memory_columns
from rorqual.model.layer_state import new_layer
from rorqual.model.layout import Layout
from rorqual.model.mtp import MTPModule
from rorqual.ops.rope import rope_table

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer


class DraftMemory:
    """What drafting needs of one sequence: the module's window, and streams of tokens that it has not read yet.

    most_drafts: most drafts at a time. most_waiting: most tokens to read at a time, the latest; unless given those of
    the window and what may be taken back. dtype: of the weights and the memory, the model's unless given; in bf16
    drafts of an fp32 model cost less and are as good.
    Positions are those of the text; the module counts its own from where its memory starts, as rope is relative.
    """

    def __init__(
        self,
        model: "Transformer",
        most_drafts: int,
        most_waiting: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cfg, like = model.cfg, model.reference
        plan = decode.plan_of(model, [])
        self._drafter = None if plan is None else plan.drafter(model, dtype or like.dtype)
        if self._drafter is not None:
            like = like.new_empty(0, dtype=self._drafter.dtype)
        self.model, self.most_drafts = model, most_drafts
        self.most_waiting = cfg.sliding_window + most_drafts if most_waiting is None else most_waiting
        with torch.inference_mode(False):
            self._layer = new_layer(cfg, cfg.mtp_layers[0], 1, most_drafts, like)
        self._table = torch.tensor([address for address, _ in memory_columns(self._layer)])
        self._held = 0  # rows in the module's window
        self._read = 0  # position behind the last of them
        self._begin = self._end = 0  # positions of the rows that wait
        self._waiting: deque[Tensor] = deque()  # [n, N, D] each

    @property
    def waiting(self) -> tuple[int, int]:
        """Positions [begin, end) of the tokens whose streams wait to be read."""
        return self._begin, self._end

    def remember(self, streams: Tensor, position: int) -> None:
        """Take in the trunk's streams [n, N, D] of tokens from `position` on."""
        if position != self._end:
            self._waiting.clear()
            self._begin = position
        self._waiting.append(streams)
        self._end = position + streams.shape[0]
        surplus = self._end - self._begin - self.most_waiting
        while surplus > 0:
            oldest = self._waiting.popleft()
            count = min(surplus, oldest.shape[0])
            if count < oldest.shape[0]:  # a copy, lest a long prompt's streams stay in memory for a few of them
                self._waiting.appendleft(oldest[count:].clone())
            self._begin += count
            surplus -= count

    def truncate(self, length: int) -> None:
        """Forget what belongs to tokens from position `length` on."""
        while self._waiting and self._end > length:
            newest = self._waiting.pop()
            count = min(self._end - length, newest.shape[0])
            if count < newest.shape[0]:
                self._waiting.append(newest[:-count])
            self._end -= count
        if self._read > length:  # slots of the ring may have been written over
            self._held, self._read = 0, length
            self._begin = self._end = length

    def draft(
        self, tokens: Sequence[int], most: int, kept: Tensor, least: float, choices: int
    ) -> tuple[list[int], list[float]]:
        """Up to `most` drafts and the module's probability of each; none without waiting rows.

        tokens: ids of the text from position `_begin + 1` on, one for each waiting row, of which the last row's was
        sampled last. kept, least: drafting ends when the product of kept[place, bin of the probability] falls below
        `least`; the last place stands for those behind it.
        choices: ids from 0 that may be drafted.
        """
        if not self._waiting:
            return [], []
        if self._begin != self._read:
            self._held = 0  # rows are missing: the memory starts anew
        streams = self._waiting[0] if len(self._waiting) == 1 else torch.cat(list(self._waiting))
        rows = streams.shape[0]
        assert len(tokens) == rows, "one next token for each waiting row"
        most = min(most, self.most_drafts)
        drafter = self._drafter
        if drafter is not None and (rows <= decode.MOST_TOKENS or drafter.dtype is not self.model.reference.dtype):
            out = drafter.step(streams.contiguous(), tokens, self._held, most, choices, self._table, kept, least)
        else:
            following = torch.tensor(tokens, device=streams.device)
            out = self._by_layers(streams, following, most, kept, least, choices)
        self._held += rows
        self._begin = self._read = self._end
        self._waiting.clear()
        return out

    def _by_layers(
        self, streams: Tensor, following: Tensor, most: int, kept: Tensor, least: float, choices: int
    ) -> tuple[list[int], list[float]]:
        """`draft` by the layer code, which is the reference."""
        model, module, held = self.model, self.model.mtp[0], self._held
        assert isinstance(module, MTPModule)
        ids: list[int] = []
        chances: list[float] = []
        product = 1.0
        streams, following = streams[None], following[None]
        while len(ids) < most and product >= least:
            layout = Layout(1, following.shape[1], following.device, [held], None, None)
            table = rope_table(layout.positions, module.attn.frequencies)
            streams = module(
                module.join(streams, model._embed(following)), following, layout, table, self._layer, None
            )[:, -1:]  # fmt: skip
            held += following.shape[1]
            logits = model.logits(module.hidden(streams))[0, 0, :choices]
            best = int(logits.argmax())
            chance = float(1 / torch.exp(logits - logits[best]).sum())
            ids.append(best)
            chances.append(chance)
            place = min(len(ids), kept.shape[0]) - 1
            product *= float(kept[place, min(int(chance * kept.shape[1]), kept.shape[1] - 1)])
            following = following.new_tensor([[best]])
        return ids, chances
