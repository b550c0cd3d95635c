"""JSON that follows a schema: values told in words to put into it, or any value that it accepts.

Class `told`: the answer must be JSON with exactly the values of the request. Class `free`: any JSON that the schema
accepts, decided by jsonschema-rs (extra `serve`). The whole content must be the JSON, as every reader reads it: a code
fence around it earns half a mark, text around it none. Source: evaluation specification, sections 3.6 and 4.7.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any, NoReturn

from rorqual.data.tasks import words
from rorqual.data.tasks.answers import IDK, final_answer, is_abstention
from rorqual.data.tasks.base import (
    Grade,
    Item,
    Piece,
    Split,
    TaskFamily,
    Turn,
    completion,
    correct,
    random_mode,
    render_document,
    split_of,
    turns_to_messages,
    wrong,
)
from rorqual.data.tasks.schemas import FEATURES, Schema, canonical, draw_schema, draw_value, faults, spoken
from rorqual.data.tasks.schemas import without_defaults as plain
from rorqual.errors import MissingExtraError

CLASSES = ("told", "free")
_TOLD = (
    "Write the {title} with {values} as JSON.",
    "Give me JSON for a {title}: {values}.",
    "Describe a {title} as JSON, with {values}.",
)
_FREE = ("Write any {title} as JSON.", "Give me an example of a {title} as JSON.", "Make up a {title} as JSON.")
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n```", re.DOTALL)


class JsonFamily(TaskFamily):
    """JSON by a schema that stands in the request."""

    name = "json"
    version = "1"

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "classes": CLASSES, "features": FEATURES}

    def _draw(self, rng: random.Random, split: Split, kind: str, feature: str) -> tuple[Turn, Schema, Any]:
        """A request with its answer, the schema, and the value of the answer."""
        while True:
            title = f"{rng.choice(words.COLOURS)} {rng.choice(words.NOUNS)}"
            if split_of(self.name, title) == split:
                break
        schema = draw_schema(rng, feature)
        value = draw_value(rng, schema, schema)
        asks = rng.choice(_TOLD if kind == "told" else _FREE).format(title=title, values=spoken(value)[1:-1])
        user = f"{asks} Answer with JSON alone that this schema accepts:\n{json.dumps(schema)}"
        return Turn(user, f"The members are {', '.join(value)}.", json.dumps(value)), schema, value

    def train_document(self, rng: random.Random) -> list[Piece]:
        mode = random_mode(rng)
        turn, _, _ = self._draw(rng, "train", rng.choice(CLASSES), rng.choice(FEATURES))
        return render_document(turns_to_messages([turn], mode=mode), mode=mode)

    def make_item(self, rng: random.Random, split: Split, index: int) -> Item:
        mode = random_mode(rng)
        kind, feature = CLASSES[index % len(CLASSES)], FEATURES[index // len(CLASSES) % len(FEATURES)]
        turn, schema, value = self._draw(rng, split, kind, feature)
        stratum = {"class": kind, "feature": feature, "mode": mode}
        meta = {"schema": schema, "value": value, "reasoning": turn.reasoning}
        return self.chat_item(rng, split, index, mode, turn, stratum, meta)

    def grade(self, item: Item, output_text: str) -> Grade:
        """The value that was told, types included, a member equal to its default there or not; or any valid value.

        P: right inside a code fence. Raises: MissingExtraError for class `free` without jsonschema-rs.
        """
        answer = final_answer(output_text, item.thinking_mode)
        if is_abstention(answer):
            return Grade("A", 0.0, None, "abstained on what could be written")
        fence = _FENCE.fullmatch(answer)
        try:
            value = read_json(fence[1] if fence else answer)
        except ValueError as error:
            return wrong(None, f"not JSON: {error}")
        schema = item.meta["schema"]
        if item.stratum["class"] == "free":
            if not accepts(schema, value):
                return wrong(value, "the schema refuses it")
        elif canonical(plain(value, schema)) != canonical(plain(item.meta["value"], schema)):
            return wrong(value, "other values than were told")
        return Grade("P", 0.5, value, "in a code fence") if fence else correct(value)

    def adversary(self, item: Item) -> list[str]:
        value, schema = item.meta["value"], item.meta["schema"]

        def say(text: str) -> str:
            return completion(item.thinking_mode, item.meta["reasoning"], text)

        text = json.dumps(value)
        texts = [
            "", IDK, "{}", "null", str(item.messages[-1]["content"]), f"Here it is: {text}", f"{text} {text}",
            f"```json\n{text}\n```", f"[{text}]", json.dumps(text), text[:-1], text[:-1] + ",}", repr(value) + " ",
            text[:-1] + f', "{next(iter(value))}": 0}}', json.dumps(schema),
        ]  # fmt: skip
        if repr(value) == text:
            texts.remove(repr(value) + " ")
        bad = list(faults(value))
        if item.stratum["class"] == "free":
            bad = [one for one in bad if not accepts(schema, one)]
        outputs = [say(one) for one in (*texts, *map(json.dumps, bad))]
        return outputs + ([item.meta["reasoning"] + text] if item.thinking_mode == "thinking" else [])


def read_json(text: str) -> Any:
    """JSON as every reader reads it. Raises: ValueError for NaN, infinities and a member that stands there twice."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)


def accepts(schema: Schema, value: Any) -> bool:
    """Whether jsonschema-rs accepts the value. Raises: MissingExtraError without it."""
    try:
        import jsonschema_rs
    except ImportError:
        raise MissingExtraError(
            'holding JSON to its schema needs jsonschema-rs, which is absent: pip install "rorqual[serve]"'
        ) from None
    return bool(jsonschema_rs.validator_for(schema, offline=True).is_valid(value))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member stands there twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
