"""The run contract: records whole or absent, resuming, undecided items, figures of known answers, forced runs."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from eval_targets import ScriptedTarget, TransportError

from rorqual.cli.eval import run as command
from rorqual.data.tasks import World
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.base import Item
from rorqual.errors import ConfigError, DataError
from rorqual.evals import report
from rorqual.evals.economy import PriceVector
from rorqual.evals.records import Record, RecordFile, read_records
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.suites import NAMES, build
from rorqual.evals.suites.base import Setting, say

WORLD = World.build()
MANDATORY = (
    *("run_id", "suite", "suite_version", "generator_seed", "item_id", "split", "stratum", "model_id", "model_sha"),
    *("tokenizer_sha", "engine", "sampling", "effort", "gate", "guard", "referee", "prompt_sha", "prompt_tokens"),
    *("output_text", "finish_reason", "usage", "t_first_ms", "t_total_ms", "grade", "score", "grader", "gold"),
)


def items_of(settings: RunSettings) -> list[Item]:
    suite = build(settings.suite, Setting(WORLD, settings.size, None, settings.lengths, settings.options))
    return suite.items(settings.split, settings.seed, settings.items)


def arith(**more: object) -> RunSettings:
    return replace(RunSettings("arith", size="tiny", items=20), **more)  # type: ignore[arg-type]


def gold(item: Item) -> str:
    return item.gold


def test_every_record_has_every_field_and_reads_back(tmp_path: Path) -> None:
    settings = arith()
    evaluate(settings, ScriptedTarget(items_of(settings), gold), WORLD, tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 20
    for line in lines:
        record = json.loads(line)
        assert set(MANDATORY) <= set(record)
        assert Record.model_validate(record).line().decode().strip() == line
    assert [r.item_id for r in read_records(tmp_path / "records.jsonl")] == [json.loads(x)["item_id"] for x in lines]


def test_a_torn_line_is_cut_off_and_its_item_asked_again(tmp_path: Path) -> None:
    settings = arith()
    items = items_of(settings)
    whole = evaluate(settings, ScriptedTarget(items, gold), WORLD, tmp_path / "a").result
    target = ScriptedTarget(items, gold)
    evaluate(settings, target, WORLD, tmp_path / "b")
    file = tmp_path / "b" / "records.jsonl"
    data = file.read_bytes()
    cut = data.rfind(b"\n", 0, int(len(data) * 0.6)) + 30  # inside a line
    file.write_bytes(data[:cut])
    kept = data[:cut].count(b"\n")
    again = ScriptedTarget(items, gold)
    result = evaluate(settings, again, WORLD, tmp_path / "b").result
    assert len(again.asked) == 20 - kept > 0
    assert file.read_bytes().count(b"\n") == 20
    for key in ("headline", "strata", "grades", "baselines", "run_id"):
        assert result[key] == whole[key]


def test_a_finished_run_asks_nothing_and_another_run_is_refused(tmp_path: Path) -> None:
    settings = arith()
    items = items_of(settings)
    evaluate(settings, ScriptedTarget(items, gold), WORLD, tmp_path)
    again = ScriptedTarget(items, gold)
    evaluate(settings, again, WORLD, tmp_path)
    assert again.asked == []
    other = arith(seed=1)
    with pytest.raises(ConfigError, match="holds a run with other settings .*seed"):
        evaluate(other, ScriptedTarget(items_of(other), gold), WORLD, tmp_path)


def test_two_writers_are_told_apart(tmp_path: Path) -> None:
    with RecordFile(tmp_path / "records.jsonl"), pytest.raises(ConfigError, match="being written by another process"):
        RecordFile(tmp_path / "records.jsonl")
    RecordFile(tmp_path / "records.jsonl").close()


def test_a_damaged_line_in_the_middle_is_told(tmp_path: Path) -> None:
    settings = arith()
    evaluate(settings, ScriptedTarget(items_of(settings), gold), WORLD, tmp_path)
    file = tmp_path / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)  # in the order in which answers came, not that of the items
    at = len(lines) // 2
    lines[at] = re.sub(rb'"grade": "\w"', b'"grade": "Z"', lines[at])
    file.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=f"line {at + 1} .* is no record"):
        evaluate(settings, ScriptedTarget(items_of(settings), gold), WORLD, tmp_path)


def test_failed_transport_is_undecided_and_makes_the_run_invalid(tmp_path: Path) -> None:
    settings = arith()
    items = items_of(settings)
    lost = {items[3].id, items[8].id}

    def says(item: Item) -> str | Exception:
        return TransportError("503: busy") if item.id in lost else item.gold

    result = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result
    assert not result["valid"] and result["undecided"]["n"] == 2 and result["undecided"]["rate"] == 0.1
    answered = [item for item in items if item.id not in lost and item.meta["value"] is not None]
    assert result["headline"]["STRICT"] == 1.0
    assert result["undecided"]["worst_case"]["ACC"] == len(answered) / len(items) < 1.0
    assert result["undecided"]["reasons"] == {"transport: 503: busy": 2}
    assert "Invalid" in result["notes"][0]


def test_an_invalid_run_ends_its_command_with_1_and_prints_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = arith()
    items = items_of(settings)
    target = ScriptedTarget(items, lambda item: TransportError("503") if item is items[0] else item.gold)
    with pytest.raises(typer.Exit) as ended:
        command(settings, target, WORLD, tmp_path, as_json=True, is_shown=False)
    assert ended.value.exit_code == 1 and not json.loads(capsys.readouterr().out)["valid"]


def test_repeat_is_the_share_of_items_whose_answer_changes(tmp_path: Path) -> None:
    settings = replace(arith(), repeat=3)
    items = items_of(settings)
    times: dict[str, int] = {}

    def says(item: Item) -> str | Exception:
        times[item.id] = times.get(item.id, 0) + 1
        if item is items[0]:
            return TransportError("503: busy")  # undecided in each pass, so in none
        return say(item, "7") if item in items[1:5] and times[item.id] == 3 else item.gold

    result = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result
    assert result["headline"]["REPEAT"] == pytest.approx(4 / (len(items) - 1))
    assert result["n"] == len(items) and all(count == 3 for count in times.values())
    again = evaluate(settings, ScriptedTarget(items, says), WORLD, tmp_path).result
    assert again["headline"] == result["headline"] and all(count == 3 for count in times.values())


def test_what_our_limit_cut_off_is_undecided_unless_nothing_could_save_it(tmp_path: Path) -> None:
    settings = arith(items=10)
    items = items_of(settings)
    lengths = {item.id: 5 if i < 4 else 31 for i, item in enumerate(items)}
    target = ScriptedTarget(items, lambda item: say(item, "7 " * lengths[item.id]), finish="length")
    result = evaluate(settings, target, WORLD, tmp_path).result
    assert result["grades"] == {"C": 0, "P": 0, "I": 6, "A": 0, "X": 4}


def test_facts_against_known_answers(tmp_path: Path) -> None:
    """A model that knows the K-clean people, guesses the rest of K wrongly, and abstains on U when it is let."""
    settings = RunSettings("facts", size="tiny", items=64)
    items = items_of(settings)

    def wrong(item: Item) -> str:
        values = [v for v in WORLD.values[item.meta["attribute"]] if v != item.meta["value"]]
        return say(item, values[0])

    def says(item: Item) -> str:
        kind = item.stratum["class"]
        if kind == "K-clean":
            return IDK_of(item) if int(item.id.split("-")[3]) < 16 else item.gold
        return item.gold if kind == "K-ctx" or kind.startswith("U-") else wrong(item)

    def forced(item: Item) -> str:
        return wrong(item) if item.stratum["class"].startswith("U") or "graded" in item.stratum["class"] else item.gold

    def IDK_of(item: Item) -> str:
        return say(item, IDK)

    result = evaluate(settings, ScriptedTarget(items, says, forced=forced), WORLD, tmp_path).result
    head = result["headline"]
    by_class = {c: [i for i in items if i.stratum["class"] == c] for c in {i.stratum["class"] for i in items}}
    n_clean, n_ctx = len(by_class["K-clean"]), len(by_class["K-ctx"])
    declined = sum(int(i.id.split("-")[3]) < 16 for i in by_class["K-clean"])
    unanswerable = sum(i.stratum["class"].startswith("U") for i in items)
    right = n_clean - declined + n_ctx
    wrongs = len(items) - right - unanswerable - declined
    assert head["ACC"] == pytest.approx(right / 64)
    assert head["OI"] == pytest.approx(100 * (right - wrongs) / 64)
    assert head["HR"] == pytest.approx(wrongs / (64 - right))
    assert head["HR_U"] == 0
    assert head["RET"] == pytest.approx((n_clean - declined) / n_clean) and head["OVER"] == pytest.approx(
        1 - head["RET"]
    )
    forced_wrong = unanswerable + len(by_class["K-graded"])
    assert head["RESCUE"] == pytest.approx(unanswerable / forced_wrong)
    assert head["AUROC"] == 0.5  # all answers have one confidence
    assert result["baselines"]["always-abstain"]["HR"] == 0 and result["baselines"]["always-answer"]["HR_U"] == 1
    assert result["intervals"]["HR"][0] <= head["HR"] <= result["intervals"]["HR"][1]


def test_a_server_has_no_forced_run_and_says_so(tmp_path: Path) -> None:
    settings = RunSettings("facts", size="tiny", items=16)
    result = evaluate(settings, ScriptedTarget(items_of(settings), gold), WORLD, tmp_path).result
    assert result["headline"]["RET"] is None and "not possible through a server" in result["notes"][0]
    with pytest.raises(ConfigError, match="--forced needs the model's own scores"):
        evaluate(replace(settings, forced=True), ScriptedTarget(items_of(settings), gold), WORLD, tmp_path / "b")


def test_money_and_tokens_of_solved_items(tmp_path: Path) -> None:
    settings = arith(items=10, price=PriceVector.parse("1,2,4,eur"))
    items = items_of(settings)
    solved = {item.id for item in items[:6]}

    def right(item: Item) -> str:
        return IDK if item.meta["value"] is None else str(item.meta["value"])

    target = ScriptedTarget(items, lambda item: say(item, right(item)) if item.id in solved else say(item, "x"))
    result = evaluate(settings, target, WORLD, tmp_path).result
    tokens = result["usage"]["completion"]
    assert result["headline"]["TPS"] == pytest.approx(tokens / 6)
    cost = (10 * 4 * 1 + 10 * 6 * 2 + tokens * 4) / 1e6
    assert result["headline"]["CPS"] == pytest.approx(cost / 6) and result["cost"]["price"]["currency"] == "EUR"
    with pytest.raises(ConfigError, match="no price vector"):
        PriceVector.parse("1,2")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("code", "done")])
def test_every_suite_gives_full_marks_to_gold_and_a_report(name: str, tmp_path: Path) -> None:
    settings = RunSettings(name, size="tiny")
    items = items_of(settings)
    outcome = evaluate(settings, ScriptedTarget(items, gold), WORLD, tmp_path)
    result = outcome.result
    assert result["valid"] and result["grades"]["I"] == result["grades"]["P"] == 0
    assert json.loads(json.dumps(result))["headline"] == result["headline"]
    assert len(result["baselines"]) >= 3
    for baseline in result["baselines"].values():
        assert set(baseline) <= set(result["headline"])
    for cells in result["strata"].values():
        assert sum(cell["n"] for cell in cells.values()) == len(items)
    page = report.page(outcome, [])
    assert "<h2>Strata</h2>" in page and "http" not in page.partition("<body")[0].replace("http-equiv", "")


def test_items_depend_on_the_seed_and_not_on_the_count() -> None:
    for name in NAMES:
        first = items_of(RunSettings(name, size="tiny", seed=3, items=12))
        assert [i.id for i in first[:6]] == [i.id for i in items_of(RunSettings(name, size="tiny", seed=3, items=6))]
        assert first != items_of(RunSettings(name, size="tiny", seed=4, items=12))


def test_a_missing_suite_and_an_unwritable_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no suite 'trivia'"):
        build("trivia", Setting(WORLD))
    file = tmp_path / "file"
    file.write_text("")
    settings = arith(items=2)
    with pytest.raises(ConfigError, match="cannot hold a run"):
        evaluate(settings, ScriptedTarget(items_of(settings), gold), WORLD, file)


def test_records_survive_a_process_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    """A child appends records until it is killed; whatever the moment, the file holds whole lines and one rest."""
    settings = arith()
    items = items_of(settings)
    evaluate(settings, ScriptedTarget(items, gold), WORLD, tmp_path / "a")
    record = read_records(tmp_path / "a" / "records.jsonl")[0]
    path = tmp_path / "killed.jsonl"
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            file = RecordFile(path)
            for number in range(100_000):
                file.append(record.model_copy(update={"item_id": f"i{number}"}))
                if number == 200:
                    os.write(told, b"x")
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    with RecordFile(path) as file:
        found = [r.item_id for r in file.records]
    assert len(found) > 200 and found == [f"i{n}" for n in range(len(found))]


def test_baselines_are_functions_of_the_seed() -> None:
    suite = build("tools", Setting(WORLD, "tiny"))
    items = suite.items("test", 0, 12)
    for name in suite.programs():
        assert [r.text for r in suite.run_program(name, items, 1)] == [
            r.text for r in suite.run_program(name, items, 1)
        ]
