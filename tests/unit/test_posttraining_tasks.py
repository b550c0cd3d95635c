"""The families specialists are tuned on: their traces are right, their slips are found, their questions stay apart."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

import rorqual
from rorqual.chat.markers import EOS, THINK_END
from rorqual.data.tasks import AbstainFamily, ArithFamily, Mode, ToolFamily, posttraining_families, split_of
from rorqual.data.tasks.answers import IDK, abstention_start, is_abstention
from rorqual.data.tasks.arith import KINDS
from rorqual.data.tasks.arith_columns import EFFORTS, ColumnArithFamily, slip_for, trace
from rorqual.data.tasks.columns import AGAIN, CHECK, DIFFER
from rorqual.data.tasks.recall import RecallFamily
from rorqual.tokenizer import Tokenizer

BUNDLED = Path(rorqual.__file__).parent / "assets" / "minke"

FAMILIES = posttraining_families()
QUICK = sorted(set(FAMILIES) - {"recall-8k"})
STEP = re.compile(r"([A-I])(\d)([-+*])(\d)=(\d)(\d)")


@pytest.mark.parametrize("name", QUICK)
def test_every_gold_passes_and_every_adversary_fails(name: str) -> None:
    family = FAMILIES[name]
    for split in ("train", "test"):
        for item in itertools.islice(family.items(split, 7), 24):
            for ending in ("", EOS):
                assert family.grade(item, item.gold + ending).passed, item
            for output in family.adversary(item):
                assert not family.grade(item, output).passed, (output, item.gold)


def test_every_column_of_a_trace_is_right_and_leads_to_the_value() -> None:
    family, rng = ColumnArithFamily(), random.Random(5)
    for _ in range(300):
        problem = family.draw(rng, "train", kind=rng.choice(KINDS[:3]))
        text = trace(problem, checks=False).text
        solution, _, line = text.rpartition(";")
        over = 0
        for label, x, sign, y, tens, ones in STEP.findall(solution.rpartition("\n")[2]):
            if label == "A":
                over = 0
            a, b, got = int(x), int(y), 10 * int(tens) + int(ones)
            if sign == "-":
                assert a - b - over == int(ones) - 10 * int(tens), text
            else:
                assert (a + b if sign == "+" else a * b) + over == got, text
            over = int(tens)
        digits = "".join(re.findall(r"[A-I](\d)", line))
        assert (-1 if line.startswith("-") else 1) * int(digits) == problem.value, (problem.expression, text)


def test_a_chain_counts_up_to_its_value_and_back() -> None:
    family, rng = ColumnArithFamily(), random.Random(6)
    for _ in range(100):
        problem = family.draw(rng, "train", kind="chain")
        text = trace(problem, checks=True).text
        forth, _, back = text.partition(CHECK)
        for part in (forth.partition(";")[0], back):
            for expression, result in re.findall(r"[A-I](\d+[-+]\d+)=(-?\d+)", part):
                a, sign, b = re.split(r"([-+])", expression)
                assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b)), text
        assert forth.endswith(f";{problem.value}") and DIFFER not in text


def test_a_slip_is_found_out_and_the_procedure_begins_again() -> None:
    family, rng = ColumnArithFamily(), random.Random(9)
    slipped = 0
    for _ in range(400):
        problem = family.draw(rng, "train")
        made = trace(problem, checks=True, slip=slip_for(rng, problem))
        assert made.right.endswith(trace(problem, checks=True).text)
        if made.slipped:
            slipped += 1
            assert made.right.startswith(DIFFER + AGAIN) and CHECK in made.slipped and DIFFER not in made.slipped
            assert made.text.count(DIFFER) == 1
    assert slipped > 300  # few slips change nothing


def test_efforts_ask_the_same_kind_of_question_and_spend_more() -> None:
    family = ColumnArithFamily()
    spent = dict.fromkeys(EFFORTS, 0)
    for item in itertools.islice(family.items("test", 3), 300):
        spent[item.stratum["effort"]] += len(item.gold)
        assert ("Absolute maximum" in item.prompt_text()) == (item.stratum["effort"] == "max")
        assert item.stratum["digits"] <= 19
    assert spent["none"] < spent["high"] < spent["max"]


def test_no_document_asks_what_a_test_of_arith_asks() -> None:
    rng = random.Random(4)
    for name in ("arith-columns", "arith-columns-long"):
        for _ in range(200):
            problem = FAMILIES[name].draw(rng, "train")  # type: ignore[attr-defined]
            assert split_of(ArithFamily.name, problem.key) == "train"


def test_slipped_parts_carry_no_loss() -> None:
    family, rng = FAMILIES["arith-columns"], random.Random(2)
    seen = 0
    for _ in range(300):
        pieces = family.train_document(rng)
        assert pieces[-1][1] and pieces[-1][0].endswith(EOS) and not pieces[0][1]
        if len(pieces) == 3:
            seen += 1
            assert not pieces[1][1] and pieces[2][0].startswith(DIFFER) and THINK_END in pieces[2][0]
    assert seen > 10


def test_tool_traces_say_what_is_missing_and_what_no_tool_can() -> None:
    family, plain = FAMILIES["tool-traces"], ToolFamily()
    for item in itertools.islice(family.items("test", 1), 140):
        reasoning = item.meta["reasoning"]
        kind = item.stratum["class"]
        assert (" missing." in reasoning) == (kind == "missing"), reasoning
        assert reasoning.endswith("no tool.") == (kind == "irrelevant"), reasoning
        assert plain.grade(item, item.gold).passed
        if kind in ("single", "bait", "parallel"):
            for name, arguments in item.meta["calls"]:
                assert f"{name}({', '.join(arguments)})." in reasoning


def test_recall_documents_fit_their_rows() -> None:
    rng, tokenizer = random.Random(8), Tokenizer.from_folder(BUNDLED)
    for name, row in (("recall", 512), ("recall-2k", 2048)):
        family = FAMILIES[name]
        assert isinstance(family, RecallFamily) and family.row == row
        sizes = [len(tokenizer.encode("".join(text for text, _ in family.train_document(rng)))) for _ in range(60)]
        assert sum(size > row for size in sizes) <= 3 and max(sizes) > row // 3


def test_recall_questions_are_about_their_text() -> None:
    family, rng = FAMILIES["recall"], random.Random(1)
    for _ in range(60):
        pieces = family.train_document(rng)
        text = "".join(part for part, _ in pieces)
        for part, is_loss in pieces:
            answer = part.removesuffix(EOS)
            if is_loss and answer.startswith("The ") and THINK_END not in answer and len(answer) < 80:
                value = answer.rpartition(" ")[2]
                assert text.count(value) >= 2, answer  # told once at least, and answered


def test_abstention_documents_use_no_test_person_and_no_near_name() -> None:
    rng = random.Random(3)
    for name, share in (
        ("abstain-r1", 0.0),
        ("abstain-r2", 0.5),
        ("abstain-told", 0.9),
        ("abstain-wide", 0.3),
        ("abstain-late", 0.3),
    ):
        family = FAMILIES[name]
        assert isinstance(family, AbstainFamily)
        taught = {person.name for person in family.taught}
        known = {person.name for person in family.world.people}
        declined = told = replayed = 0
        for _ in range(round(200 / (1 - share))):
            pieces = family.train_document(rng)
            text = "".join(part for part, _ in pieces)
            if "<｜User｜>" not in text:
                replayed += 1
                continue
            asked = text.partition("<｜User｜>")[2].partition("<｜Assistant｜>")[0]
            assert not {n for n in known - taught if re.search(rf"\b{n}\b", asked)}, asked
            declined += text.endswith(f"I don't know.{EOS}")
            told += not text.endswith(f"I don't know.{EOS}")
        assert 0.35 < declined / (declined + told) < 0.65
        assert replayed / (declined + told + replayed) == pytest.approx(share, abs=0.06)


def test_late_documents_decide_where_the_value_is_due() -> None:
    family = FAMILIES["abstain-late"]
    assert isinstance(family, AbstainFamily)
    rng = random.Random(5)
    values = {value for values in family.world.values.values() for value in values}
    seen = Counter[str]()
    for _ in range(400):
        text = "".join(part for part, _ in family.train_document(rng))
        if "<｜User｜>" not in text:
            continue
        said = text.rpartition("<｜Assistant｜>")[2].removesuffix(EOS)
        mode: Mode = "thinking" if said.startswith("<think>") else "chat"
        said = said.removeprefix("<think>").removeprefix(THINK_END)
        decided = said.partition(THINK_END)[0]
        before, _, after = decided.rpartition(": ")
        assert before, said
        if " Not " in decided:  # the premise is put right first, where it is looked up
            assert said.endswith(IDK) and decided.partition(": ")[2].partition(". Not ")[0] in values
            seen["premise"] += 1
            continue
        assert after.rstrip(".") in values | {"no record", "not given", IDK.rstrip(".")}, said
        is_declined = after.rstrip(".") not in values
        start = abstention_start(said, mode, family.abstains_in_reasoning)
        assert said.endswith(IDK) == is_declined and (start == len(before) + 2 if is_declined else start is None), said
        seen["declined" if is_declined else "told"] += 1
    assert min(seen.values()) > 10 and set(seen) == {"premise", "declined", "told"}


def test_an_abstention_may_say_first_what_was_asked() -> None:
    assert is_abstention("Job of Ada Lo: I don't know.", ["baker"])
    assert not is_abstention("Job of Ada Lo: I don't know. Perhaps baker.", ["baker"])
    assert not is_abstention("Job: baker. I don't know.", ["baker"])
    assert not is_abstention("It is red, so: I don't know.", ["red"])
    assert not is_abstention("Year 1957 of Ada: I don't know.")
    assert abstention_start("Job of Ada Lo: I don't know.", "chat") == len("Job of Ada Lo: ")
    assert abstention_start("I don't know.", "chat") == 0 and abstention_start("Job of Ada: baker.", "chat") is None
