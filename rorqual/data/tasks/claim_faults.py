"""Right answers damaged in one labelled way each: what a claim check has to catch.

Source: evaluation specification, section 4.8. `corrupt` gives what a referee's catch rate is measured with;
its false alarms are measured with the right answer itself (fault `clean`).
"""

from __future__ import annotations

import random
from typing import Literal, get_args

from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import Item
from rorqual.data.tasks.claims import ClaimsFamily, claim_line

Fault = Literal["unsupported", "contradicted", "wrong-citation", "missing-citation", "over-general", "altered-quote"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
_GENERAL = "{name} has a job, a home and a history, as the sources show."


def corrupt(
    family: ClaimsFamily, item: Item, fault: Fault | Literal["clean"], rng: random.Random
) -> tuple[str, int | None]:
    """The item's right answer with `fault` put into one of its lines, and that line's number from 0 (None for clean).

    unsupported: a fact of the same person that no source tells. contradicted: another value than the source's.
    wrong-citation: another source. missing-citation: none. over-general: true and empty, in place of all lines.
    altered-quote: one word of the quotation changed. Only for items that have an answer.
    """
    lines = final_answer(item.gold, item.thinking_mode).split("\n")
    if fault == "clean":
        return "\n".join(lines), None
    if fault == "over-general":
        return _GENERAL.format(name=item.meta["name"]), 0
    facts = family.facts_of(item)
    by_attribute = {f.attribute: f for f in facts if f.name == item.meta["name"]}
    place = rng.randrange(len(lines))
    fact = by_attribute[item.meta["attributes"][place]]
    if fault == "contradicted":
        value = rng.choice([v for v in family.world.values[fact.attribute] if v != fact.value])
        lines[place] = claim_line(fact, value=value)
    elif fault == "wrong-citation":
        lines[place] = claim_line(
            fact, cited=rng.choice([f.source for f in facts if f is not fact] or [fact.source + 1])
        )
    elif fault == "missing-citation":
        lines[place] = claim_line(fact).replace(f" [{fact.source}]", "")
    elif fault == "altered-quote":
        words = fact.sentence.split()
        at = rng.randrange(len(words))
        bare = words[at].rstrip(".,")  # a quotation without its last full stop is still exact
        words[at] = (bare[:-1] if len(bare) > 3 else bare + "s") + words[at][len(bare) :]
        lines[place] = claim_line(fact, quote=" ".join(words))
    else:
        # a value of an attribute of the same person that no source speaks of, or of a person that no source knows
        absent = [a for a in family.world.values if a not in by_attribute]
        attribute = rng.choice(absent) if absent else fact.attribute
        name = item.meta["name"] if absent else family.world.fresh_name(rng, item.split)
        told = type(fact)(fact.source, name, attribute, rng.choice(family.world.values[attribute]), fact.sentence)
        lines[place] = claim_line(told)
    return "\n".join(lines), place
