"""Schemas, values and figures of the JSON suite and of nested tool calls, against a validator and known answers."""

import json
import random
from itertools import islice
from pathlib import Path

import jsonschema_rs
import pytest
from eval_targets import ScriptedTarget

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS
from rorqual.data.tasks import Item, JsonFamily, NestedToolFamily, World
from rorqual.data.tasks.schemas import FEATURES, canonical, draw_schema, draw_value, faults, without_defaults
from rorqual.data.tasks.tool import calls_of, render_calls
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.suites import build
from rorqual.evals.suites.base import Setting, say

WORLD = World.build()


@pytest.mark.parametrize("feature", FEATURES)
def test_values_obey_their_schema_and_faults_are_other_values(feature: str) -> None:
    refused = 0
    for seed in range(60):
        rng = random.Random(seed)
        schema = draw_schema(rng, feature)
        jsonschema_rs.meta.validate(schema)
        validator = jsonschema_rs.validator_for(schema)
        value = draw_value(rng, schema, schema)
        assert validator.is_valid(value) and json.loads(json.dumps(value)) == value
        found = [canonical(bad) for bad in faults(value)]
        assert canonical(value) not in found
        refused += sum(not validator.is_valid(json.loads(bad)) for bad in found)
    assert refused > 120  # a schema that accepted everything would make a suite that cannot fail


def test_optional_members_and_trees_come_in_both_forms() -> None:
    for feature, member in (("optional", "note"), ("default", "retries")):
        values = []
        for seed in range(40):
            rng = random.Random(seed)
            schema = draw_schema(rng, feature)
            values.append(member in draw_value(rng, schema, schema))
        assert 8 < sum(values) < 32
    trees = []
    for seed in range(40):
        rng = random.Random(seed)
        schema = draw_schema(rng, "recursive")
        trees.append(canonical(draw_value(rng, schema, schema)).count('"parts"'))
    assert min(trees) == 0 and max(trees) >= 2


def test_a_default_may_be_said_or_left_out_and_nothing_else() -> None:
    schema = {"properties": {"retries": {"type": "integer", "default": 3}, "level": {"type": "integer"}}}
    assert without_defaults({"retries": 3, "level": 3}, schema) == {"level": 3}
    for other in (3.0, "3", True, 4):
        assert "retries" in without_defaults({"retries": other}, schema)
    family, seen = NestedToolFamily(), 0
    for item in islice(family.items("test", 1), 90):
        name, arguments = item.meta["calls"][0]
        if item.stratum["class"] != "default" or "retries" in arguments:
            continue
        shape = next(t["function"]["parameters"] for t in item.tools or () if t["function"]["name"] == name)
        default = shape["properties"]["retries"]["default"]
        for value, passes in ((default, True), (default + 1, False)):
            text = render_calls(item.thinking_mode, "", [[name, {**arguments, "retries": value}]])
            assert family.grade(item, text).passed == passes
        seen += 1
    assert seen > 1


def test_nested_arguments_survive_the_models_own_form() -> None:
    for item in islice(NestedToolFamily().items("test", 5), 60):
        calls = [[name, canonical(arguments)] for name, arguments in item.meta["calls"]]
        assert [list(call) for call in calls_of(item.gold, item.thinking_mode)] == calls
        whole = encode_messages(item.messages, tools=item.tools, thinking_mode=item.thinking_mode) + item.gold + EOS
        assert whole.startswith(item.prompt_text())


def test_json_must_be_the_whole_answer_as_every_reader_reads_it() -> None:
    family = JsonFamily()
    item = next(i for i in family.items("test", 0) if i.stratum["class"] == "free")
    text = item.gold.split("</think>")[-1]
    name = next(iter(item.meta["value"]))
    grades = {
        text: "C",
        json.dumps(item.meta["value"], indent=2): "C",
        f"```json\n{text}\n```": "P",
        text[:-1] + f', "{name}": 1' + "}": "I",  # one member twice
        "NaN": "I",
        text + ".": "I",
        "I don't know.": "A",
    }
    for answer, letter in grades.items():
        grade = family.grade(item, say(item, answer))
        assert (grade.grade, grade.passed) == (letter, letter == "C"), answer


def test_json_figures_of_known_answers(tmp_path: Path) -> None:
    """A third right, a third in text the referee can mend, a third that says nothing."""
    settings = RunSettings("json", size="tiny")
    items = build("json", Setting(WORLD, "tiny")).items("test", 0)
    place = {item.id: index % 3 for index, item in enumerate(items)}

    def says(item: Item) -> str:
        text = json.dumps(item.meta["value"])
        return say(item, (text, text.replace("{", "{ ", 1)[:-1] + ",}", "It is a lantern.")[place[item.id]])

    result = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result
    head, told = result["headline"], [i for i in items if i.stratum["class"] == "told"]
    third = sum(place[i.id] == 0 for i in items) / len(items)
    assert head["JSON"] == head["SCHEMA"] == head["ACC"] == pytest.approx(third)
    mendable = sum(place[i.id] < 2 for i in items) / len(items)
    assert head["SCHEMA_REPAIRED"] == pytest.approx(mendable)
    assert head["EM"] == pytest.approx(sum(place[i.id] == 0 for i in told) / len(told))
    assert head["EM_REPAIRED"] == pytest.approx(sum(place[i.id] < 2 for i in told) / len(told))
    assert head["HARM"] == 0 and "SCHEMA" in result["intervals"]
    valid = result["baselines"]["any-valid"]
    assert valid["SCHEMA"] == 1 and valid["EM"] < 0.5  # a valid answer is not yet the right one


def test_tool_figures_tell_nested_arguments_and_repairs(tmp_path: Path) -> None:
    """Nested calls whose numbers are written as text: refused as they come, right once mended."""
    settings = RunSettings("tools", size="tiny")
    items = build("tools", Setting(WORLD, "tiny")).items("test", 0)

    def spoilt(value: object) -> object:
        if isinstance(value, dict):
            return {name: spoilt(part) for name, part in value.items()}
        if isinstance(value, list):
            return [spoilt(part) for part in value]
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def says(item: Item) -> str:
        if item.family != "tool-nested":
            return item.gold
        name, arguments = item.meta["calls"][0]
        return render_calls(item.thinking_mode, "", [[name, spoilt(arguments)]])

    nested = [i for i in items if i.family == "tool-nested"]
    changed = [i for i in nested if spoilt(i.meta["calls"][0][1]) != i.meta["calls"][0][1]]
    assert len(nested) == 14 and changed
    head = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result["headline"]
    assert head["ARG_NESTED"] == pytest.approx(1 - len(changed) / len(nested))
    assert head["NAME"] == 1 and head["SCHEMA"] < head["SCHEMA_REPAIRED"]
