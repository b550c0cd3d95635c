"""Token ids to text, a piece at a time, never showing half a character.

A byte-level token may end inside a UTF-8 character. The decoder holds such bytes back until the character
is complete; bytes that can no longer become a character turn into U+FFFD, as
`bytes.decode(errors="replace")` has it, so the pieces of any split always join to the text of the whole.
"""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Incremental decoder made by `Tokenizer.stream_decoder()`; one per sequence."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; may be empty. Raises DataError for an unknown id."""
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """The end of the sequence: U+FFFD for a character that never got its last bytes, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
