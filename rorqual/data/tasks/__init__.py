"""Synthetic task families with exact answers: generators and graders in one place.

>>> family = families("rorqual-world-1")["arith"]
>>> item = next(family.items("test", seed=0))
>>> family.grade(item, item.gold).passed
True
"""

from rorqual.data.tasks.abstain import REPLAY_SHARES, AbstainFamily
from rorqual.data.tasks.aggregation import AggregationFamily
from rorqual.data.tasks.arith import ArithFamily
from rorqual.data.tasks.arith_columns import ColumnArithFamily
from rorqual.data.tasks.arith_limits import ArithLimitsFamily
from rorqual.data.tasks.base import (
    CANARY,
    SPLITS,
    Grade,
    Item,
    Mode,
    Piece,
    Size,
    Split,
    TaskFamily,
    Turn,
    split_of,
)
from rorqual.data.tasks.census import CensusFamily
from rorqual.data.tasks.census_world import Census
from rorqual.data.tasks.chat import ChatFamily
from rorqual.data.tasks.claims import ClaimsFamily
from rorqual.data.tasks.code import CodeFamily
from rorqual.data.tasks.done import DoneFamily
from rorqual.data.tasks.facts import FactsFamily
from rorqual.data.tasks.fim import FimFamily
from rorqual.data.tasks.hop import HopFamily
from rorqual.data.tasks.mrcr import MrcrFamily
from rorqual.data.tasks.needle import NeedleFamily
from rorqual.data.tasks.needle_multi import MultiNeedleFamily
from rorqual.data.tasks.recall import RECALL_ROWS, RecallFamily
from rorqual.data.tasks.structured import JsonFamily
from rorqual.data.tasks.threads import ThreadsFamily
from rorqual.data.tasks.tool import ToolFamily
from rorqual.data.tasks.tool_dialogue import ToolDialogueFamily
from rorqual.data.tasks.tool_nested import NestedToolFamily
from rorqual.data.tasks.tool_traces import ToolTracesFamily
from rorqual.data.tasks.world import DEFAULT_WORLD, WORLD_VERSION, World, WorldSize

# Suggested shares of training tokens among the families (they sum to 1).
DEFAULT_WEIGHTS: dict[str, float] = {
    "facts": 0.26,
    "needle": 0.20,
    "arith": 0.18,
    "tool": 0.14,
    "code": 0.08,
    "fim": 0.06,
    "chat": 0.08,
}


def families(
    world_id: str = DEFAULT_WORLD, *, size: WorldSize = "tiny", model_name: str = "Minke"
) -> dict[str, TaskFamily]:
    """All families by name, over the world `world_id`. Raises: DataError for an unknown size or an empty
    id.
    """
    world = World.build(world_id, size)
    facts, arith, code = FactsFamily(world), ArithFamily(), CodeFamily()
    others = (facts.train_turn, arith.train_turn, code.train_turn)
    made: list[TaskFamily] = [
        facts,
        NeedleFamily(world),
        arith,
        ToolFamily(),
        code,
        FimFamily(),
        ChatFamily(model_name=model_name, other_turns=others),
    ]
    return {family.name: family for family in made}


def evaluation_families(world_id: str = DEFAULT_WORLD, *, size: WorldSize = "tiny") -> dict[str, TaskFamily]:
    """The families that the suites of `rorqual.evals` measure beyond `families()`. Raises: DataError as it.

    They are no part of the default mixture of training, which has its weights for `families()` alone.
    """
    world = World.build(world_id, size)
    return {
        "hop": HopFamily(),
        "mrcr": MrcrFamily(),
        "aggregation": AggregationFamily(),
        "claims": ClaimsFamily(world),
        "threads": ThreadsFamily(),
        "done": DoneFamily(),
        "needle-multi": MultiNeedleFamily(world),
        "tool-dialogue": ToolDialogueFamily(),
        "tool-nested": NestedToolFamily(),
        "json": JsonFamily(),
        "arith-limits": ArithLimitsFamily(),
    }


def posttraining_families(world_id: str = DEFAULT_WORLD, *, size: WorldSize = "tiny") -> dict[str, TaskFamily]:
    """The families that specialists are tuned on, by the names recipes use. Raises: DataError as `families`.

    Their questions, splits and graders are those of the families above; what differs is the reasoning they teach, the
    lengths they reach and the balance of their cases.
    """
    world = World.build(world_id, size)
    made: list[TaskFamily] = [
        ColumnArithFamily(),
        ColumnArithFamily(name="arith-columns-long", long_share=0.75),
        *(RecallFamily(world, name=name) for name in RECALL_ROWS),
        ToolTracesFamily(),
        *(AbstainFamily(world, name) for name in REPLAY_SHARES),
    ]
    return {family.name: family for family in made}


def named_families(
    world_id: str = DEFAULT_WORLD, *, size: WorldSize = "tiny", model_name: str = "Minke"
) -> dict[str, TaskFamily]:
    """All that a recipe can name without asking for a study: the three groups above. Raises: DataError as they."""
    return {
        **families(world_id, size=size, model_name=model_name),
        **evaluation_families(world_id, size=size),
        **posttraining_families(world_id, size=size),
    }


def study_families(world_id: str, *, size: str = "small") -> dict[str, TaskFamily]:
    """Families for studies, which no mixture takes unless a recipe names them: so far `census`.

    Raises: DataError for an unknown size or an empty id.
    """
    return {"census": CensusFamily(Census.build(world_id, size))}


__all__ = [
    "CANARY",
    "DEFAULT_WEIGHTS",
    "DEFAULT_WORLD",
    "SPLITS",
    "WORLD_VERSION",
    "AbstainFamily",
    "AggregationFamily",
    "ArithFamily",
    "ArithLimitsFamily",
    "Census",
    "CensusFamily",
    "ChatFamily",
    "ClaimsFamily",
    "CodeFamily",
    "ColumnArithFamily",
    "DoneFamily",
    "FactsFamily",
    "FimFamily",
    "Grade",
    "HopFamily",
    "Item",
    "JsonFamily",
    "Mode",
    "MrcrFamily",
    "MultiNeedleFamily",
    "NeedleFamily",
    "NestedToolFamily",
    "Piece",
    "RecallFamily",
    "Size",
    "Split",
    "TaskFamily",
    "ThreadsFamily",
    "ToolDialogueFamily",
    "ToolFamily",
    "ToolTracesFamily",
    "Turn",
    "World",
    "WorldSize",
    "evaluation_families",
    "families",
    "named_families",
    "posttraining_families",
    "split_of",
    "study_families",
]
