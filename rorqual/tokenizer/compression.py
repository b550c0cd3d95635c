"""The compressed vocabulary that Engram hashes: tokens that differ only in case, accents or spacing share an id.

Source: Engram paper, section 2 (about 23% fewer ids on a vocabulary of 128K). Only addresses use it; the model's own
embedding still sees every token.
"""

import re

import numpy as np
import numpy.typing as npt
from tokenizers import normalizers

from rorqual.tokenizer.tokenizer import Tokenizer

_PLAIN = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
)
_SPACES = re.compile(r"\s+")


def canonical(text: str) -> str:
    """What tokens are compared by: NFKC, no accents, lower case, spaces trimmed; spaces alone are one space.

    Where nothing is left (an accent alone), the text as it is.
    """
    plain = _SPACES.sub(" ", _PLAIN.normalize_str(text))
    return plain if plain == " " else plain.strip() or text


def compress_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int64]:
    """Token id -> compressed id, [vocab_size], numbered in the order of first appearance.

    A token that is no text by itself (a piece of a character) is only like itself. Ids that stand for nothing, up to
    the model's `vocab_size`, share one.
    """
    numbers: dict[str | bytes | None, int] = {}
    out = np.empty(vocab_size, dtype=np.int64)
    for token_id in range(vocab_size):
        key: str | bytes | None = None
        if token_id < tokenizer.vocab_size:
            raw = tokenizer.token_bytes(token_id)
            try:
                text = raw.decode("utf-8")
                key = raw if "\ufffd" in text else canonical(text) if raw else None
            except UnicodeDecodeError:
                key = raw
        out[token_id] = numbers.setdefault(key, len(numbers))
    return out
