"""From messages to the turns that are rendered: tools placed, user turns merged, results ordered, reasoning
dropped.

There is no tool role in the text: tool results become parts of a user turn. These four steps are where
prompts of different engines most often part ways; each follows the released encoder.
"""

from collections.abc import Sequence
from typing import Any

from rorqual.chat.turns import Turn

# Roles that stay when old reasoning is dropped; what else stood before the last user turn (developer) goes.
_KEPT_WHEN_DROPPING = ("user", "system", "latest_reminder", "assistant")


def place_tools(turns: Sequence[Turn], functions: list[Any]) -> list[Turn]:
    """Put a request's tools on its first turn, or on a new system turn if that is not system or developer."""
    if not functions:
        return list(turns)
    placed = list(turns)
    if not placed or placed[0].role not in ("system", "developer"):
        placed.insert(0, Turn("system", "messages"))
    placed[0].tools, placed[0].tools_where = functions, "tools"
    return placed


def merge_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Join tool results and user texts that follow each other into one user turn.

    A result joins any user turn before it; a user text joins one only if that has no task. The joining turn's
    own fields (its task too) are lost, as in the released encoder.
    """
    merged: list[Turn] = []
    for turn in turns:
        if turn.blocks is None:
            merged.append(turn)
            continue
        last = merged[-1] if merged else None
        if last is not None and last.blocks is not None and (turn.role == "tool" or last.task is None):
            last.blocks += turn.blocks
        elif turn.role == "tool":
            merged.append(Turn("user", turn.where, blocks=turn.blocks))
        else:
            merged.append(turn)
    return merged


def order_results(turns: Sequence[Turn]) -> None:
    """Sort the tool results of each user turn by the order of the calls they answer, in place.

    Text blocks keep their slots; an unknown id counts as the first call; the sort is stable.
    """
    positions: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            positions = {call.id: i for i, call in enumerate(turn.calls) if call.id}
        elif turn.blocks is not None and positions:
            results = [block for block in turn.blocks if block.call_id is not None]
            ordered = iter(sorted(results, key=lambda block: positions.get(block.call_id or "", 0)))
            turn.blocks = [block if block.call_id is None else next(ordered) for block in turn.blocks]


def last_user_index(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn (tool results are user turns), or -1."""
    return max((i for i, turn in enumerate(turns) if turn.is_user), default=-1)


def drop_old_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns left when old reasoning is dropped.

    Only developer turns before the last user turn disappear; the reasoning of assistants there needs no
    removal, because rendering asks for the position anyway.
    """
    last_user = last_user_index(turns)
    return [turn for i, turn in enumerate(turns) if i >= last_user or turn.role in _KEPT_WHEN_DROPPING]
