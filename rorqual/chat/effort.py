"""From the effort words of an API request to what the encoder takes.

Clients say `reasoning_effort: "medium"` or `"none"`; the encoder knows a thinking mode and two or three
words, and the words mean other text in each revision. Source: DeepSeek's API documentation for the hosted
models of each revision. Two cells are ours: `none` with 2026-04 (switches thinking off, as it does later) and
`minimal` with 2026-04 (read as `low`).
"""

from typing import Final

from rorqual.chat.markers import REVISIONS
from rorqual.errors import RequestError

_CHAT = ("chat", None)

_API_EFFORTS: Final[dict[str, dict[str | None, tuple[str, str | None]]]] = {
    "2026-04": {
        "none": _CHAT,
        "minimal": ("thinking", "high"),
        "low": ("thinking", "high"),
        "medium": ("thinking", "high"),
        "high": ("thinking", "high"),
        "xhigh": ("thinking", "max"),
        "max": ("thinking", "max"),
        None: ("thinking", "high"),
    },
    "2026-07": {
        "none": _CHAT,
        "minimal": ("thinking", "low"),
        "low": ("thinking", "low"),
        "medium": ("thinking", "high"),
        "high": ("thinking", "high"),
        "xhigh": ("thinking", "high"),
        "max": ("thinking", "max"),
        None: ("thinking", "high"),
    },
}


def resolve_effort(word: str | None, revision: str = "2026-04") -> tuple[str, str | None]:
    """Return `(thinking_mode, reasoning_effort)` for an API effort word; None is a request without the field.

    Raises: RequestError for a word no API documents, or an unknown revision.
    """
    if revision not in _API_EFFORTS:
        raise RequestError(
            f"revision is {revision!r}, for which no effort levels are known here. "
            f"Use the checkpoint's own: {' or '.join(REVISIONS)}.",
            param="revision",
        )
    table = _API_EFFORTS[revision]
    if word not in table:
        words = ", ".join(key for key in table if key is not None)
        raise RequestError(
            f"reasoning_effort is {word!r}, which is no effort level this model knows. "
            f"Use one of {words}, or leave the field out.",
            param="reasoning_effort",
        )
    return table[word]
