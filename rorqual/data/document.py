"""A training document: token ids, which of them are learned, and whether a row may cut it.

Every document begins with BOS. Its text arrives as pieces `(text, is_loss)` whose concatenation is the
whole text; the whole is tokenised once, so the ids are those the model meets when serving, and the mask
is laid over them by bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rorqual.tokenizer import Tokenizer
from rorqual.tokenizer.tokenizer import clean_text

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Pieces = Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Document:
    """`ids` int64 [n] starting with BOS; `loss_mask` bool [n], True where the token is a target to be
    learned.

    `is_splittable`: a row's end may cut it (long plain text). A question and its answer should stay together.
    """

    ids: Ids
    loss_mask: Mask
    is_splittable: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def encode_pieces(tokenizer: Tokenizer, pieces: Pieces) -> tuple[Ids, Mask]:
    """Ids of the joined pieces and their loss mask; BOS (never a target) is put first unless the text
    begins with it.

    Markers in the pieces become control tokens. A token is a target when its first byte lies in a piece
    marked as loss, so a token that straddles a border belongs to the piece it starts in.
    """
    texts = [clean_text(text) for text, _ in pieces]
    ids = np.array(tokenizer.encode("".join(texts)), dtype=np.int64)
    lengths = tokenizer.byte_lengths[ids]
    starts = np.cumsum(lengths) - lengths
    ends = np.cumsum([len(text.encode()) for text in texts])
    flags = np.array([is_loss for _, is_loss in pieces] + [False], dtype=np.bool_)
    # side="right": a token starting exactly at a border belongs to the later piece; empty pieces own nothing
    mask = flags[np.searchsorted(ends, starts, side="right")]
    if len(ids) == 0 or ids[0] != tokenizer.bos_token_id:
        ids = np.concatenate([[tokenizer.bos_token_id], ids])
        mask = np.concatenate([[False], mask])
    mask[0] = False
    return ids, mask
