"""Text to token ids and back: loading and training byte-level BPE vocabularies with V4's markers."""

from rorqual.tokenizer.compression import compress_vocabulary
from rorqual.tokenizer.identify import V4_VOCABULARY, Identity, identify
from rorqual.tokenizer.special import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    MARKER_TOKENS,
    PAD,
    SPECIAL_TOKENS,
    THINK,
    USER,
)
from rorqual.tokenizer.stream import StreamDecoder
from rorqual.tokenizer.tokenizer import Tokenizer
from rorqual.tokenizer.train import build_pre_tokenizer, train_tokenizer

__all__ = [
    "ASSISTANT",
    "BOS",
    "DSML",
    "END_THINK",
    "EOS",
    "FIM_BEGIN",
    "FIM_END",
    "FIM_HOLE",
    "MARKER_TOKENS",
    "PAD",
    "SPECIAL_TOKENS",
    "THINK",
    "USER",
    "V4_VOCABULARY",
    "Identity",
    "StreamDecoder",
    "Tokenizer",
    "build_pre_tokenizer",
    "compress_vocabulary",
    "identify",
    "train_tokenizer",
]
