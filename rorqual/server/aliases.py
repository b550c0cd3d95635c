"""Names of hosted models that clients have built in, and what they say besides which model is meant.

Each stands for a model served here; the answer names that one in its metadata. Source: DeepSeek's API documentation
(`deepseek-chat` and `deepseek-reasoner` were V4-Flash without and with thinking) and its Anthropic guide.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

PRO: Final = "deepseek-v4-pro"
FLASH: Final = "deepseek-v4-flash"

_THINKING: Final[dict[str, bool]] = {"deepseek-chat": False, "deepseek-reasoner": True}
_FAMILY: Final[dict[str, str]] = {
    PRO: PRO,
    FLASH: FLASH,
    "deepseek-v4-flash-vision-exp": FLASH,
    "deepseek-flash": FLASH,
    "deepseek-chat": FLASH,
    "deepseek-reasoner": FLASH,
}
_LONG_CONTEXT = "[1m]"  # Claude Code's way of asking for a long context; every context here is as long as it gets


def resolve(name: str, served: Collection[str], own: dict[str, str], *, claude: bool = False) -> str | None:
    """The served model that `name` stands for, or None.

    served: names of the models, first the one hosted names stand for. own: the operator's aliases, which go first.
    claude: also read Anthropic's names, as the hosted Anthropic base does.
    """
    for known in (name, name.removesuffix(_LONG_CONTEXT)):
        known = own.get(known, known)
        if known in served:
            return known
        family = _FAMILY.get(known)
        if family is None and claude and known.startswith("claude-"):
            family = PRO if "opus" in known else FLASH
        if family is not None:
            return own.get(family, family if family in served else next(iter(served)))
    return None


def thinks(name: str) -> bool | None:
    """Whether a request by this name thinks unless it says otherwise; None where the name does not tell."""
    return _THINKING.get(name.removesuffix(_LONG_CONTEXT))
