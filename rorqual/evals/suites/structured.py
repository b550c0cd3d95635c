"""JSON by a schema: whether it parses, whether the schema accepts it before and after the referee's repair, and whether
it says what was told. Repairs are counted on the same outputs, so no second call is made for them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

from rorqual.data.tasks.answers import final_answer
from rorqual.data.tasks.base import Grade, Item
from rorqual.data.tasks.schemas import Schema, draw_value
from rorqual.data.tasks.structured import JsonFamily, accepts, read_json
from rorqual.evals.economy import PriceVector
from rorqual.evals.suites.base import Figure, Figures, Program, Row, Suite, abstain, say, spent
from rorqual.evals.targets.base import Answer
from rorqual.referee.json_text import NotJson, read_leniently
from rorqual.referee.schemas import fit, schema_of

_SPOKEN = re.compile(r'(\w+) ("[^"]*"|-?\d+|true|false)')


class JsonSuite(Suite):
    """Values told and values free, in turns, over nine features of schemas."""

    name = "json"
    answer_words = None
    max_tokens = 256
    sizes = {"tiny": 36, "small": 360, "full": 3600}
    strata = ("class", "feature", "mode")

    def build_family(self) -> JsonFamily:
        return JsonFamily()

    def settle(self, item: Item, answer: Answer) -> Grade:
        """As ever; but what was cut off after a beginning that is no JSON object is decided: nothing could save it."""
        if final_answer(answer.text, item.thinking_mode)[:1] not in ("", "{", "`"):
            return self.grade(item, answer.text)
        return super().settle(item, answer)

    def programs(self) -> dict[str, Program]:
        def schema(item: Item) -> Schema:
            found: Schema = item.meta["schema"]
            return found

        def by_schema(item: Item, rng: random.Random) -> str:
            """Whatever the schema accepts, without reading what was told."""
            return say(item, json.dumps(draw_value(rng, schema(item), schema(item))))

        def search(item: Item, rng: random.Random) -> str:
            """What stands behind the name of each member of the schema, on the top level."""
            request = str(item.messages[-1]["content"]).partition("\n")[0]
            told = {name: json.loads(value) for name, value in reversed(_SPOKEN.findall(request))}
            return say(item, json.dumps({name: told[name] for name in schema(item)["properties"] if name in told}))

        return {
            "empty": lambda item, rng: say(item, "{}"),
            "any-valid": by_schema,
            "search": search,
            "always-abstain": abstain,
        }

    def figures(self, rows: Sequence[Row], forced: Sequence[Row] | None, price: PriceVector) -> Figures:
        told = [r for r in rows if r.item.stratum["class"] == "told"]
        mended = {r.item.id: self._mended(r) for r in rows}
        return {
            "JSON": Figure.of_share(_is_json(r.answer) for r in rows),
            "SCHEMA": Figure.of_share(_is_json(r.answer) and accepts(_shape(r), read_json(r.answer)) for r in rows),
            "SCHEMA_REPAIRED": Figure.of_share(accepts(_shape(r), read_json(mended[r.item.id])) for r in rows),
            "EM": Figure.of_share(r.passed for r in told),
            "EM_REPAIRED": Figure.of_share(self.grade(r.item, say(r.item, mended[r.item.id])).passed for r in told),
            "HARM": Figure.of_share(
                not self.grade(r.item, say(r.item, mended[r.item.id])).passed for r in rows if r.passed
            ),
            "FENCED": Figure.of_share(r.answer.startswith("```") for r in rows),
            "ACC": Figure.of_share(r.passed for r in rows),
            **spent(rows, price),
        }

    def _mended(self, row: Row) -> str:
        """The answer as the referee would hand it on; `null`, which no schema here accepts, where it is no JSON."""
        try:
            value, _ = read_leniently(row.answer)
        except NotJson:
            return "null"
        fitted, _ = fit(schema_of(_shape(row), "schema"), value)
        return json.dumps(fitted)


def _shape(row: Row) -> Any:
    return row.item.meta["schema"]


def _is_json(text: str) -> bool:
    try:
        read_json(text)
    except ValueError:
        return False
    return True
