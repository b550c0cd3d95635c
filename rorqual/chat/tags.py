"""What the stream parser looks for in each of its states, and how much of a text's tail it must hold back.

A terminator may be cut anywhere by the stream, so the longest tail that could still become one is held until
more text decides. Tags are matched by their beginning (`<｜DSML｜invoke`), never by token: the `<` and the
newlines before it arrive glued to other text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rorqual.chat import markers

# Spellings of the bar seen from hosted APIs and copied prompts; accepted as tags only on request.
_VARIANTS = ("｜｜DSML｜｜", "||DSML||", "|DSML|")
_DOUBLED = "｜｜DSML｜｜"
_NEWLINES = ("", "\n", "\n\n")


@dataclass(frozen=True, slots=True)
class Stops:
    """The terminators of one state: a pattern with a named group for each kind, and their proper prefixes."""

    pattern: re.Pattern[str]
    prefixes: frozenset[str]
    longest_prefix: int

    @classmethod
    def build(cls, groups: Mapping[str, Sequence[str]]) -> "Stops":
        """Make the stops from literals by group; earlier groups and longer literals win at the same place."""
        literals = {name: sorted(set(texts), key=len, reverse=True) for name, texts in groups.items()}
        alternatives = (f"(?P<{name}>{'|'.join(map(re.escape, texts))})" for name, texts in literals.items())
        prefixes = {text[:n] for texts in literals.values() for text in texts for n in range(1, len(text))}
        return cls(re.compile("|".join(alternatives)), frozenset(prefixes), max(map(len, prefixes)))

    def held(self, text: str) -> int:
        """Length of the longest tail of `text` that could grow into a terminator."""
        for length in range(min(len(text), self.longest_prefix), 0, -1):
            if text[-length:] in self.prefixes:
                return length
        return 0


@dataclass(frozen=True, slots=True)
class Tags:
    """The stops of every state."""

    text: Stops
    """Reasoning and content: eos, think_end, drop (BOS, <think>), calls, invoke, stray tags, a bare bar."""
    block: Stops
    """Between calls: invoke, calls_close, eos."""
    invoke: Stops
    """Inside a call, between parameters: parameter, invoke_close, and what ends a call never closed."""
    value: Stops
    """Inside a value: close. Nothing else ends a value; it may hold any other markup as text."""
    forbidden: Stops
    """What must not appear in reasoning or content, not even by two sides of a gap joining."""
    header: re.Pattern[str]
    """End of a tag's attributes (group `end`), or markup that shows the tag is broken."""


@lru_cache(maxsize=2)
def tags(accept_variants: bool) -> Tags:
    """Return the stops, with or without the variant spellings."""
    bars = (markers.DSML, *_VARIANTS) if accept_variants else (markers.DSML,)

    def spelled(tag: str) -> list[str]:
        return [tag.replace(markers.DSML, bar) for bar in bars]

    calls_open = spelled(markers.CALLS_OPEN.removesuffix(">"))
    invoke_open = spelled(markers.INVOKE_OPEN)
    calls_close = spelled(markers.CALLS_CLOSE)
    strays = [start + bar for start in ("<", "</") for bar in {*bars, _DOUBLED}]
    text = {
        "eos": [markers.EOS],
        "think_end": [markers.THINK_END],
        "drop": [markers.BOS, markers.THINK_START],
        "calls": [newlines + tag for newlines in _NEWLINES for tag in calls_open],
        "invoke": [newlines + tag for newlines in _NEWLINES for tag in invoke_open],
        "stray": strays,
        "bare": [markers.DSML],
    }
    block = {"invoke": invoke_open, "calls_close": calls_close, "eos": [markers.EOS]}
    invoke = {
        "parameter": spelled(markers.PARAMETER_OPEN),
        "invoke_close": spelled(markers.INVOKE_CLOSE.removesuffix(">")),
        **block,
    }
    value = {"close": spelled(markers.PARAMETER_CLOSE.removesuffix(">"))}
    broken = "|".join(map(re.escape, (*(start + bar for bar in bars for start in ("</", "<")), markers.EOS)))
    return Tags(
        Stops.build(text),
        Stops.build(block),
        Stops.build(invoke),
        Stops.build(value),
        Stops.build({"forbidden": markers.FORBIDDEN_IN_REPLY}),
        re.compile(f'(?P<end>">)|(?P<broken>{broken})'),
    )
