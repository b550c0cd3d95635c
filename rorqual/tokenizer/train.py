"""Learn a byte-level BPE vocabulary laid out like DeepSeek-V4's.

Ids: 0, 1, 2 are BOS, EOS and pad; then 256 byte symbols; then merges; then the markers of the prompt
format, last. The pre-tokenizer is V4's; there is no normaliser, so any
text survives a round trip.
"""

import re
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from rorqual.errors import ConfigError, DataError
from rorqual.tokenizer.special import MARKER_TOKENS, SPECIAL_TOKENS, placeholder
from rorqual.tokenizer.tokenizer import Tokenizer, clean_text

_NUMBERS = r"\p{N}{1,%d}"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_EVERYTHING_ELSE = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
        " ?[\\p{P}\\p{S}]+[\r\n]*",
        "\\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_MARKERS = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *MARKER_TOKENS))))
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + len(MARKER_TOKENS)


def build_pre_tokenizer(digits: int = 3) -> pre_tokenizers.PreTokenizer:
    """V4's three splits, then the byte alphabet. `digits` is the longest run of digits one token may hold.

    V4 groups digits by up to three; small models learn arithmetic far better with one digit a token.
    Raises: ConfigError when digits < 1.
    """
    if digits < 1:
        raise ConfigError(
            f"digits is {digits}. A number needs at least one digit a piece. Fix: digits=3 for V4's "
            "rule, 1 to split all."
        )
    splits = (_NUMBERS % digits, _HAN_AND_KANA, _EVERYTHING_ELSE)
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, digits: int = 3, show_progress: bool = False
) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` ids. Deterministic for the same texts.

    Markers that occur in `texts` are left out of the statistics, so they never become ordinary merges.
    When the texts are too small for that many merges, V4's placeholder tokens fill the room before the
    markers. Raises: ConfigError for a vocabulary too small for bytes and markers; DataError when there is
    no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size is {vocab_size}, but {MIN_VOCAB_SIZE} ids go to bytes and markers alone. "
            f"No room is left for merges. Fix: choose at least {MIN_VOCAB_SIZE}, e.g. 4096."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = build_pre_tokenizer(digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKER_TOKENS),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    num_chars = 0

    def training_text() -> Iterator[str]:
        nonlocal num_chars
        for text in texts:
            for part in _MARKERS.split(clean_text(text)):
                num_chars += len(part)
                yield part

    backend.train_from_iterator(training_text(), trainer)
    if num_chars == 0:
        raise DataError(
            "The tokenizer was given no text to learn from. Merges come from counting pairs in text. "
            "Fix: check that the corpus has at least one document that is not empty."
        )
    missing = vocab_size - len(MARKER_TOKENS) - backend.get_vocab_size()
    names = (*map(placeholder, range(missing)), *MARKER_TOKENS)
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer = Tokenizer(backend, origin="train_tokenizer")
    assert tokenizer.vocab_size == vocab_size and tokenizer.bos_token_id == 0
    return tokenizer
