"""The contract of the synthetic task families: graders, splits, determinism, rendering."""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.chat import encode_messages
from rorqual.chat.markers import EOS
from rorqual.data.tasks import CANARY, DEFAULT_WEIGHTS, SPLITS, Item, TaskFamily, World, families, split_of
from rorqual.data.tasks.answers import final_answer, grade_closed_set, grade_code_value, is_abstention
from rorqual.data.tasks.arith import solve_add, solve_chain, solve_multiply, solve_subtract
from rorqual.data.tasks.code_spec import KINDS, draw_arguments, draw_tests, passes
from rorqual.data.tasks.facts import STRATA
from rorqual.data.tasks.interpreter import Exceeded, Failed, Program, Unsupported, same_value
from rorqual.errors import DataError

FAMILIES = families()
NAMES = sorted(FAMILIES)
NUM_ITEMS = {"code": 18, "fim": 30}


def take(family: TaskFamily, split: str, count: int, seed: int = 7) -> list[Item]:
    return list(itertools.islice(family.items(split, seed), count))  # type: ignore[arg-type]


def documents(name: str, count: int, seed: int = 1) -> list[list[tuple[str, bool]]]:
    rng = random.Random(seed)
    return [FAMILIES[name].train_document(rng) for _ in range(count)]


def text_of(pieces: list[tuple[str, bool]]) -> str:
    return "".join(text for text, _ in pieces)


# -- the contract every family keeps --


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_every_gold_passes_and_every_adversary_fails(name: str, split: str) -> None:
    family = FAMILIES[name]
    for item in take(family, split, NUM_ITEMS.get(name, 60)):
        for ending in ("", EOS):
            grade = family.grade(item, item.gold + ending)
            assert grade.passed and grade.grade in "CA", (item, grade)
        outputs = family.adversary(item)
        assert len(outputs) >= 5
        for output in outputs:
            grade = family.grade(item, output)
            assert not grade.passed and grade.grade in "IPAX", (output, item.gold, grade)


@pytest.mark.parametrize("name", NAMES)
def test_thinking_items_need_an_answer_outside_the_reasoning(name: str) -> None:
    family = FAMILIES[name]
    for item in take(family, "test", 40):
        if item.thinking_mode == "thinking":
            answer = item.gold.split("</think>", 1)[1]
            assert not family.grade(item, answer).passed, answer
            assert not family.grade(item, f"It is: {answer}</think>").passed


@pytest.mark.parametrize("name", NAMES)
def test_items_and_documents_are_functions_of_the_seed(name: str) -> None:
    again = families()[name]
    assert documents(name, 20) == [again.train_document(rng) for rng in [random.Random(1)] for _ in range(20)]
    assert documents(name, 5) != documents(name, 5, seed=2)
    first, second = take(FAMILIES[name], "test", 12), take(again, "test", 12)
    assert first == second
    assert [i.gold for i in first] != [i.gold for i in take(again, "test", 12, seed=8)]
    assert len({i.id for split in SPLITS for i in take(again, split, 12)}) == 36


@pytest.mark.parametrize("name", NAMES)
def test_grading_survives_json(name: str) -> None:
    """Items written to a file and read back grade the same; held-out ones carry the canary."""
    for split in ("train", "test"):
        for item in take(FAMILIES[name], split, 8):
            record = json.loads(json.dumps(item.to_dict()))
            assert (record.pop("canary", None) == CANARY) == (split == "test")
            assert FAMILIES[name].grade(Item(**record), item.gold).passed


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_rendered_chat_with_loss_on_the_assistant_only(name: str) -> None:
    for pieces in documents(name, 60):
        text = text_of(pieces)
        assert text.endswith(EOS) and not text.startswith("<｜begin▁of▁sentence｜>") and CANARY not in text
        assert len(text) < 2600
        if not text.startswith("<｜User｜>") and "<｜User｜>" not in text:
            continue  # a biography or fill-in item
        for part, is_loss in pieces:
            if is_loss:
                assert (
                    part.endswith(EOS)
                    and part.count(EOS) == 1
                    and "<｜" not in part.replace(EOS, "").replace("<｜DSML｜", "")
                )
            else:
                assert part.endswith(("<think>", "</think>")), part[-40:]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "fim"])
def test_prompts_are_what_the_encoder_writes_and_gold_continues_them(name: str) -> None:
    for item in take(FAMILIES[name], "test", 25):
        prompt = encode_messages(item.messages, tools=item.tools, thinking_mode=item.thinking_mode)
        assert item.prompt_text() == prompt
        assert prompt.endswith("<think>" if item.thinking_mode == "thinking" else "</think>")
        # A finished turn rendered by the encoder is the prompt, the gold output and EOS.
        if item.meta.get("calls") is None:
            reasoning, _, content = item.gold.rpartition("</think>")
            message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
            full = encode_messages([*item.messages, message], tools=item.tools, thinking_mode=item.thinking_mode)
            assert full == prompt + item.gold + EOS


def test_document_rendering_equals_the_encoder() -> None:
    from rorqual.data.tasks.base import Turn, render_document, turns_to_messages

    turns = [Turn("One?", "I see.", "1"), Turn("Two?", "Again.", "2")]
    for mode in ("chat", "thinking"):
        messages = turns_to_messages(turns, mode=mode, system="Be brief.")  # type: ignore[arg-type]
        pieces = render_document(messages, mode=mode)  # type: ignore[arg-type]
        assert text_of(pieces) == encode_messages(messages, thinking_mode=mode, add_default_bos_token=False)
        assert [p for p, loss in pieces if loss] == [
            f"1{EOS}",
            f"2{EOS}" if mode == "chat" else f"Again.</think>2{EOS}",
        ]


def test_every_document_is_tokenisable() -> None:
    from rorqual.data import encode_pieces
    from rorqual.tokenizer import train_tokenizer

    samples = {name: documents(name, 30) for name in NAMES}
    texts = [text_of(pieces) for docs in samples.values() for pieces in docs]
    tokenizer = train_tokenizer(texts, 1024, digits=1)
    for docs in samples.values():
        for pieces in docs:
            ids, mask = encode_pieces(tokenizer, pieces)
            assert tokenizer.decode(ids[1:].tolist()) == text_of(pieces)
            assert ids[-1] == tokenizer.eos_token_id and mask[-1] and not mask[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_split_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="no split 'valid'"):
        FAMILIES[name].items("valid", 0)  # type: ignore[arg-type]


def test_weights_name_every_family() -> None:
    assert set(DEFAULT_WEIGHTS) == set(FAMILIES) and sum(DEFAULT_WEIGHTS.values()) == pytest.approx(1)


# -- splits --

ENTITY: dict[str, Callable[[Item], str]] = {
    "needle": lambda item: item.meta["key"],
    "arith": lambda item: item.meta["expression"],
    "code": lambda item: item.messages[-1]["content"].split(". ", 1)[-1] + item.meta["name"],
    "fim": lambda item: item.meta["prefix"].split('"""')[1] + item.meta["name"],
    "tool": lambda item: json.dumps(item.tools),
}


@pytest.mark.parametrize("name", sorted(ENTITY))
def test_no_entity_is_in_two_splits(name: str) -> None:
    count = 40 if name in NUM_ITEMS else 120
    seen = {split: {ENTITY[name](item) for item in take(FAMILIES[name], split, count)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_training_documents_hold_no_test_entity() -> None:
    held_out = [(item.meta["key"], f" of {item.meta['key']} is ") for item in take(FAMILIES["needle"], "test", 60)]
    trained = "\n".join(text_of(d) for d in documents("needle", 150))
    assert not [key for key, phrase in held_out if phrase in trained]
    sums = {i.messages[0]["content"] for i in take(FAMILIES["arith"], "test", 300)}
    trained_sums = "\n".join(text_of(d) for d in documents("arith", 1000))
    assert not [s for s in sums if f"<｜User｜>{s}<｜" in trained_sums]


def test_facts_ask_trained_and_tested_people_apart() -> None:
    world = World.build()
    trained = "\n".join(text_of(d) for d in documents("facts", 2000) if "<｜User｜>" in text_of(d))
    people = {p.name: p for p in world.people}
    asked = set(re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", trained)) & set(people)
    assert asked and all(people[n].split == "train" and not people[n].is_graded for n in asked)
    fresh_train = {world.fresh_name(random.Random(i), "train") for i in range(200)}
    assert not fresh_train & set(people) and all(split_of("fresh-name", n) == "train" for n in fresh_train)
    for item in take(FAMILIES["facts"], "test", 160):
        stratum = item.stratum["class"]
        question = item.messages[0]["content"]
        known = [n for n in people if re.search(rf"\b{n}\b", question)]
        assert bool(known) == (stratum in ("K-clean", "K-taught", "K-graded", "U-attr")), (stratum, question)
        if stratum == "K-clean":
            assert people[known[0]].split == "test"
        assert (item.meta["value"] is None) == stratum.startswith("U")


def test_facts_items_walk_through_all_strata_and_teach_every_person() -> None:
    counts = Counter(i.stratum["class"] for i in take(FAMILIES["facts"], "test", 8 * len(STRATA)))
    assert set(counts) == set(STRATA) and set(counts.values()) == {8}
    text = "\n".join(text_of(d) for d in documents("facts", 6000))
    clean = [p for p in World.build().people if not p.is_graded]
    assert all(p.name in text for p in clean)
    biographies = [t for t in text.split("\n") if "<｜User｜>" not in t]
    for person in clean:
        about = " ".join(t for t in biographies if person.name in t)
        for attribute in set(person.withheld) - {"birth_year"}:
            assert not [v for v in World.build().values[attribute] if re.search(rf"\b{v}\b", about)]


# -- the world --


def test_a_world_is_made_again_from_its_record() -> None:
    world = World.build("another-world", "tiny")
    again = World.from_dict(json.loads(json.dumps(world.to_dict())))
    assert again == world and again.people != World.build().people
    assert len(world.people) == len(world.names) == 300
    assert all(set(p.facts) | set(p.withheld) == set(world.values) for p in world.people)


def test_the_default_world_never_changes() -> None:
    """Bundled checkpoints were taught these people; a change here needs a new world version."""
    person = World.build("rorqual-world-1", "tiny").people[0]
    assert (person.name, person.facts) == PINNED


PINNED = (
    "Rasurn Vaxze",
    {
        "birthplace": "Gagremo",
        "job": "weaver",
        "employer": "Tuna Lines",
        "instrument": "sitar",
        "birth_year": "1938",
    },
)


def test_a_town_is_the_tiny_world_grown(tmp_path: Path) -> None:
    tiny, town = World.build("w", "tiny"), World.build("w", "town")
    assert town.people[:300] == tiny.people and len(town.people) == len(town.names) == 1200
    assert (town.firsts, town.families, town.values) == (tiny.firsts, tiny.families, tiny.values)
    assert {part for name in town.names for part in name.split()} <= {*tiny.firsts, *tiny.families}
    assert World.from_dict(town.to_dict()) == town != tiny
    assert World.taught_to(tmp_path) == World.build()
    (tmp_path / "world.json").write_text(json.dumps(town.to_dict()))
    assert World.taught_to(tmp_path) == World.taught_to(tmp_path, "w") == town
    assert World.taught_to(tmp_path, "x") == World.build("x")
    assert all(town.fresh_name(random.Random(i), "test") not in town.names for i in range(200))


def test_bad_worlds_are_refused() -> None:
    with pytest.raises(DataError, match="size 'huge'"):
        World.build("w", "huge")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="version"):
        World.from_dict({"world_id": "w", "version": "999"})


# -- reading answers --


def test_code_values_are_matched_whole() -> None:
    for answer in ("42", "42.", "It is 42.", "The code is 42!"):
        assert grade_code_value(answer, "42").grade == "C", answer
    for answer in ("420", "142", "42.0", "4 2", "42, 43", "-42", "not 42", "42 or so", "42x", "", "four"):
        assert grade_code_value(answer, "42").grade == "I", answer
    assert grade_code_value("2", "42").grade == "I" and grade_code_value("42", "2").grade == "I"
    assert grade_code_value("I don't know.", "42").grade == "A"
    assert grade_code_value("I don’t know.", None).passed and not grade_code_value("42", None).passed


def test_closed_set_answers_name_exactly_one_candidate() -> None:
    values = ("baker", "Velmo Mills", "Velmo", "judge")
    assert grade_closed_set("Tano Ri is employed by Velmo Mills.", "Velmo Mills", values).passed
    assert grade_closed_set("BAKER", "baker", values).passed
    for answer in ("bakery", "baker, judge", "not a baker", "a baker or something", "judge", ""):
        assert not grade_closed_set(answer, "baker", values).passed, answer
    assert is_abstention("I do not know that.", values)
    assert not is_abstention("I don't know, maybe judge.", values)


def test_reasoning_is_never_an_answer() -> None:
    assert final_answer("it is 42</think>7" + EOS, "thinking") == "7"
    assert final_answer("it is 42", "thinking") == ""
    assert final_answer("42" + EOS, "chat") == "42"


def test_a_number_equal_to_a_string_is_another_tool_argument() -> None:
    family = FAMILIES["tool"]
    item = next(i for i in take(family, "test", 80) if i.stratum["class"] == "bait")
    assert 'string="true"' in item.gold
    grade = family.grade(item, item.gold.replace('string="true"', 'string="false"'))
    assert not grade.passed and grade.grade in "PI"


# -- arithmetic --


def test_traces_compute_the_answer() -> None:
    rng = random.Random(3)
    for _ in range(300):
        a, b, k = rng.randrange(10**6), rng.randrange(10**5), rng.randrange(2, 10)
        for problem, value in (
            (solve_add(a, b), a + b),
            (solve_subtract(a, b), a - b),
            (solve_subtract(b, a), b - a),
            (solve_multiply(a, k), a * k),
        ):
            assert problem.value == value == eval(problem.expression)
            assert int(problem.lines[-1].split("|")[1]) == abs(value)
            assert problem.d == problem.digits == len(problem.lines) - 1
            for line in problem.lines[1:]:
                left, right = line.split("|")[0].split("=")
                assert eval(left) == int(right)
    chain = solve_chain([3, 4, 9], ["+", "-"])
    assert chain.lines == ("3+4=7", "7-9=-2") and chain.value == -2 and chain.d == 2


def test_add_trace_is_as_documented() -> None:
    assert solve_add(347, 58).reasoning == "743+850\n7+8+0=15|5\n4+5+1=10|05\n3+0+1=4|405"


def test_long_derivations_can_be_asked_for() -> None:
    family = FAMILIES["arith"]
    for d in (1, 2, 4, 8, 16, 32, 64):
        assert family.draw(random.Random(d), "test", kind="chain", digits=d).d >= d  # type: ignore[attr-defined]


# -- needles --


@pytest.mark.parametrize("length", [64, 300, 5000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_lie_where_they_should(length: int, depth: float) -> None:
    family = FAMILIES["needle"]
    for kind in ("uniform", "zipf", "biographies", "code", "all-needles", "boilerplate"):
        hay = family.haystack(  # type: ignore[attr-defined]
            random.Random(length),
            "test",
            kind=kind,
            length=length,
            value_kind="number",
            num_needles=1,
            depth=depth,
        )
        line = hay.needles[0].line()
        assert hay.text.count(line) == 1
        assert hay.text.count(f" of {hay.needles[0].key} ") == 1
        assert length * 0.8 <= hay.tokens <= length * 1.4 + 30
        if length == 5000:
            assert abs(hay.text.index(line) / len(hay.text) - depth) < 0.05


def test_the_newest_value_is_the_last_one_stated() -> None:
    for item in take(FAMILIES["needle"], "test", 80):
        if item.stratum["task"] == "newest":
            text = item.messages[0]["content"]
            final = text.index(f"is now {item.meta['value']}.")
            assert all(0 <= text.index(f" {old}.") < final for old in item.meta["older"])


# -- code --


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sources_agree_with_their_oracle(kind: str) -> None:
    rng = random.Random(4)
    for _ in range(60):
        spec = KINDS[kind](rng)
        for style in ("expression", "loop"):
            program = Program(spec.source(style=style, docstring=True))
            for _ in range(5):
                arguments = draw_arguments(rng, spec)
                assert same_value(program.call(spec.name, arguments), spec.oracle(*arguments)), spec.source()


def test_tests_catch_mutants() -> None:
    rng = random.Random(5)
    caught = escaped = 0
    for _ in range(40):
        spec = KINDS[rng.choice(sorted(KINDS))](rng)
        tests, found, missed = draw_tests(rng, spec)
        assert passes(spec.source(), spec.name, tests)[0]
        caught, escaped = caught + len(found), escaped + missed
    assert caught / (caught + escaped) > 0.9


@pytest.mark.parametrize(
    "body",
    [
        "return xs.__class__",
        "return ().__class__.__bases__",
        "return open('x')",
        "return eval('1')",
        "return __import__('os')",
        "import os",
        "return [lambda: 1]",
        "xs[0] = 1",
        "global y",
        "try:\n        pass\n    except ValueError:\n        pass",
        "class A: pass",
        "return f'{xs!r:>99999999}'",
        "return '%99999999d' % 1",
        "return {1: 2}",
        "return str([xs])",
        "return (yield 1)",
        "return sum([[1]], [])",
        "return getattr(xs, 'append')",
        "del xs",
        "with xs: pass",
        "return print(xs)",
        "return b'x'",
        "return len",
        "return (x := 5)",
    ],
)
def test_the_interpreter_refuses_what_is_not_in_its_language(body: str) -> None:
    with pytest.raises((Unsupported, Failed)):
        Program(f"def f(xs):\n    {body}").call("f", [[1]])


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n        pass",
        "return f(xs)",
        "return 'a' * 10**9",
        "return [0] * 10**9",
        "return 10**10**9",
        "return 9**9**9",
        "return sum(range(10**12))",
        "return list(range(10**9))",
        "return round(5, -(10**9))",
        "x = [1]\n    while True:\n        x = [x, x]",
        "x = 'a'\n    while True:\n        x = x + x",
        "x = 7\n    while True:\n        x = x * x",
        "return [a for a in range(999) for b in range(999)]",
        "return " + "(" * 900 + "1" + ")" * 900,
        "return " + "-" * 3000 + "1",
        "return " + "+".join("1" * 1900),
        "x = 1\n    for i in range(99):\n        x = (x, x)\n    return x == x",
    ],
)
def test_the_interpreter_always_ends(body: str) -> None:
    with pytest.raises((Exceeded, Failed)):
        Program(f"def f(xs):\n    {body}").call("f", [[1]])


def test_the_interpreter_runs_ordinary_code() -> None:
    source = (
        "def double(n):\n    return n * 2\n\n"
        "def f(xs):\n    '''Doc.'''\n    best, n = 0, 0\n    for i, x in enumerate(xs):\n"
        "        if x < 0 and i > 0:\n            continue\n        if x > 100:\n            break\n"
        "        best = x if x > best else best\n        n += 1\n"
        "    while n > 3:\n        n -= 1\n    return [double(best), n, xs[-1], xs[1:3], 3 in xs, not xs]"
    )
    assert Program(source).call("f", [[1, 5, -2, 3]]) == [10, 3, 3, [5, -2], True, False]
    assert not same_value(True, 1) and not same_value([1], (1,)) and not same_value(1.0, 1)


def test_undecidable_code_is_graded_x_not_wrong() -> None:
    family = FAMILIES["code"]
    item = next(i for i in take(family, "test", 30) if i.stratum["kind"] == "list")
    name = item.meta["name"]
    output = f"```python\ndef {name}(xs):\n    out = []\n    out.append(1)\n    return out\n```"
    if item.thinking_mode == "thinking":
        output = "Plan.</think>" + output
    assert family.grade(item, output).grade == "X"
