"""The control markers of DeepSeek-V4's vocabulary, under their V4 names and in the order of their V4 ids.

Source: the released tokenizer. The bar is U+FF5C and the low block U+2581; the ASCII look-alikes
are other text. Left out: V4's reserved placeholders and multimodal markers, which our own vocabularies
have no room for.
"""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
# Flagged special: a decoder told to skip special tokens drops these three and keeps every marker below.
SPECIAL_TOKENS = (BOS, EOS, PAD)

FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

# Not flagged special; they stand at the end of the vocabulary.
MARKER_TOKENS = (
    FIM_HOLE,
    FIM_BEGIN,
    FIM_END,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    DSML,
    LATEST_REMINDER,
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)


def placeholder(number: int) -> str:
    """V4's name for a reserved, unused token; fills a vocabulary whose corpus ran out of merges."""
    return f"<｜place▁holder▁no▁{number}｜>"
