"""Evaluations of the bundled model: forced answers, block hits, a server beside the checkpoint, kills, the command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live_server import live
from sandboxes import need

from rorqual.data.tasks import World, families
from rorqual.data.tasks.code import extract_code
from rorqual.data.tasks.done import verify_by_interpreter
from rorqual.data.tasks.needle import NeedleFamily
from rorqual.errors import ConfigError
from rorqual.evals import report
from rorqual.evals.records import Sampling, read_records
from rorqual.evals.run import RunSettings, evaluate
from rorqual.evals.selection import by_chance, cover, span_of
from rorqual.evals.suites import NAMES, build
from rorqual.evals.suites.base import Setting
from rorqual.evals.suites.needle import in_phase
from rorqual.evals.targets.base import Prompt
from rorqual.evals.targets.loaded import LoadedTarget, guard_options
from rorqual.evals.targets.server import ServerTarget
from rorqual.model.trace import Trace
from rorqual.posttrain.rewards.code_execution import CodeRunner
from rorqual.server import create_app

WORLD = World.build()


@pytest.fixture(scope="module")
def minke() -> Iterator[LoadedTarget]:
    target = LoadedTarget("minke", parallel=8)
    yield target
    target.close()


def test_facts_of_the_bundled_model(minke: LoadedTarget, tmp_path: Path) -> None:
    outcome = evaluate(RunSettings("facts", size="tiny"), minke, WORLD, tmp_path)
    head = outcome.result["headline"]
    assert outcome.result["valid"]
    for metric in ("ACC", "OI", "HR", "HR_U", "RET", "OVER", "RESCUE", "AUROC", "AURC", "ECE", "TPS"):
        assert head[metric] is not None, metric
    assert head["ACC"] > outcome.result["baselines"]["search"]["ACC"]  # it knows something that no text says
    assert head["AUROC"] > 0.5
    assert minke.identity.engine.flags["determinism"] in ("D0", "D2")
    plots = report.write(outcome, tmp_path)
    assert {"reliability.png", "risk-coverage.png"} <= {Path(p).name for p in plots}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(plots) and 'src="http' not in page and "<link" not in page


def test_forced_answers_never_decline_and_others_stay_the_same(minke: LoadedTarget, tmp_path: Path) -> None:
    evaluate(RunSettings("facts", size="tiny", items=48), minke, WORLD, tmp_path)
    free = {r.item_id: r for r in read_records(tmp_path / "records.jsonl")}
    forced = {r.item_id: r for r in read_records(tmp_path / "forced.jsonl")}
    assert free.keys() == forced.keys()
    declined = [i for i, r in free.items() if r.grade == "A"]
    assert len(declined) > 10
    assert all(r.grade in "CI" for r in forced.values())
    for item, record in free.items():
        if record.grade != "A" and "no record" not in record.output_text and "not give" not in record.output_text:
            assert forced[item].output_text == record.output_text


def test_a_server_gives_the_answers_of_the_checkpoint(minke: LoadedTarget) -> None:
    sampling = Sampling(max_tokens=160)
    chosen = [families()[name].items("test", 5) for name in ("facts", "tool", "arith")]
    with live(create_app(minke.engine, "minke")) as url:
        target = ServerTarget(url, parallel=2)
        assert target.identity.model_id == "minke" and not target.can_force
        for stream in chosen:
            for _ in range(8):
                prompt = Prompt.of(next(stream))
                here, there = minke.answer(prompt, sampling), target.answer(prompt, sampling)
                assert there.text == here.text and there.finish_reason in (here.finish_reason, "tool_calls")
                assert there.usage.prompt == here.usage.prompt
                assert there.usage.completion == here.usage.completion
        with pytest.raises(ConfigError, match="cannot be made to answer"):
            target.force(prompt, sampling, lambda text: None)
        target.close()


def test_threads_tell_what_the_server_restored(minke: LoadedTarget, tmp_path: Path) -> None:
    with live(create_app(minke.engine, "minke")) as url:
        target = ServerTarget(url, parallel=2)
        result = evaluate(RunSettings("threads", size="tiny", items=4), target, WORLD, tmp_path).result
        target.close()
    assert result["valid"] and result["headline"]["RESTORED"] == 1.0


def holding(pieces: list[bytes], text: str, at: int, value: str) -> list[int]:
    """Tokens with a byte of `value`, which stands at character `at` of `text`; byte by byte."""
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    begin = len(text[:at].encode())
    return sorted(set(owner[begin : begin + len(value.encode())]))


def test_block_hits_are_those_of_one_plain_pass(minke: LoadedTarget) -> None:
    """Counted again from picks of a single forward call over the whole text, with loops."""
    model, k = minke.engine.model, minke.engine.model.cfg.index_topk
    family = NeedleFamily(WORLD, lengths=(600,), count_tokens=minke.count_tokens)
    found = 0
    for item in (x for x, _ in zip(family.items("test", 2), range(8), strict=False)):
        value = item.meta["value"]
        if value is None:
            continue
        prompt = Prompt.of(item)
        signals = minke.needle_signals(prompt, item.gold, value, item.meta["needle_offset"])
        ids, reply = minke.prompt_ids(prompt), minke.tokenizer.encode(item.gold)
        text = minke.tokenizer.decode(ids)
        pieces = [minke.tokenizer.token_bytes(i) for i in ids]
        content = text.index(str(item.messages[-1]["content"])) + item.meta["needle_offset"]
        places = holding(pieces, text, text.index(value, content), value)
        writes = holding([minke.tokenizer.token_bytes(i) for i in reply], item.gold, item.gold.index(value), value)
        trace = Trace(capture=["*"])
        with torch.inference_mode():
            model.forward_streams(torch.tensor([ids + reply]), state=model.new_state(1), trace=trace)
        hits = []
        for layer in (s for s in model.cfg.layers if s.has_indexer):
            picks = trace.captured[f"layers.{layer.index}.attn.index_topk"][0]
            for n in writes:
                query = len(ids) + n - 1
                if (query + 1) // 4 >= 2 * k:
                    pool = {e for e in range((query + 1) // 4) for p in places if 4 * (e - 1) <= p <= 4 * e + 3}
                    hits.append((bool(pool & set(picks[query].tolist())), pool <= set(picks[query].tolist())))
        if hits:
            found += 1
            assert signals["nbh"] == pytest.approx(sum(h for h, _ in hits) / len(hits))
            assert signals["nbh_full"] == pytest.approx(sum(f for _, f in hits) / len(hits))
    assert found >= 3


def test_parts_of_the_block_hits() -> None:
    assert cover([8, 9], 4) == {2, 3} and cover([7], 4) == {1, 2}
    assert list(span_of([b"ab", b"cde", b"f"], 3, 6)) == [1, 2] and list(span_of([b"ab", b"c"], 0, 1)) == [0]
    assert by_chance(10, 1, 4) == pytest.approx(0.4) and by_chance(4, 2, 3) == 1
    assert by_chance(1000, 2, 4) == pytest.approx(1 - (1 - 0.004) ** 2, rel=1e-2)


def test_phases_of_needle_and_prompt_are_reached(minke: LoadedTarget) -> None:
    setting = Setting(WORLD, "tiny", minke.count_tokens, (192,))
    items = [i for i in build("needle", setting).items("test", 1, 64) if i.meta.get("needle_offset") is not None]
    cells = {(i.stratum["phase_needle"], i.stratum["phase_prompt"]) for i in items}
    assert len(cells) >= 14
    for item in items[:16]:
        ids = minke.prompt_ids(Prompt.of(item))
        assert len(ids) % 4 == item.stratum["phase_prompt"]
        line = str(item.messages[-1]["content"])[item.meta["needle_offset"] :].partition("\n")[0]
        value = item.meta["value"] if isinstance(item.meta["value"], str) else item.meta["value"][0]
        assert value in line
    plain = next(iter(NeedleFamily(WORLD, lengths=(96,)).items("test", 0)))
    assert in_phase(plain, minke.count_tokens, 0, 0).gold == plain.gold


def test_a_guard_that_is_not_there_is_refused() -> None:
    from dataclasses import fields

    from rorqual.engine import EngineSettings

    assert guard_options(None) == {}
    if "guard" in {f.name for f in fields(EngineSettings)}:
        assert guard_options(True) == {"guard": "default"} and guard_options(False) == {"guard": "off"}
    else:
        with pytest.raises(ConfigError, match="no retrieval guard"):
            guard_options(True)


@pytest.mark.slow
def test_code_runs_in_a_sandbox_and_is_judged_outside() -> None:
    need(("function", "zygote"))
    family = families()["code"]
    runner = CodeRunner()
    try:
        items = [item for item, _ in zip(family.items("test", 4), range(2), strict=False)]
        for item in items:
            name, tests = item.meta["name"], item.meta["tests"]
            assert runner.grade(item.meta["source"], name, tests).grade == "C"
            for mutant in item.meta["mutants"][:2]:
                assert runner.grade(mutant, name, tests).grade == "I"
            # what the interpreter cannot decide, a sandbox can
            assert runner.grade("import os\n" + item.meta["source"], name, tests).grade == "C"
        name, tests = items[0].meta["name"], items[0].meta["tests"]
        for source in (
            f"def {name}(*a):\n    while True:\n        pass",
            f"def {name}(*a):\n    raise SystemExit(0)",
            f"class E:\n    def __eq__(self, o):\n        return True\ndef {name}(*a):\n    return E()",
            "x = 1",
            f"import builtins\nbuiltins.repr = lambda v: '1'\ndef {name}(*a):\n    return None",
        ):
            assert runner.grade(source, name, tests[:1]).grade in "I", source
    finally:
        runner.close()


@pytest.mark.slow
def test_done_is_judged_alike_by_interpreter_and_sandbox(minke: LoadedTarget, tmp_path: Path) -> None:
    need(("function", "zygote"))
    suite = build("done", Setting(WORLD, "tiny"))
    try:
        for item in suite.items("test", 0, 4):
            assert suite.grade(item, item.gold).passed
            for source in (item.meta["fixed"], item.meta["faulty"]):
                name, hidden = item.meta["name"], item.meta["hidden"]
                assert suite.verify(source, name, hidden) == verify_by_interpreter(source, name, hidden)  # type: ignore[attr-defined]
    finally:
        suite.close()  # type: ignore[attr-defined]
    assert extract_code("no code") is None


@pytest.mark.slow
def test_the_command_prints_one_object(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rorqual",
        "eval",
        "arith",
        "--quick",
        "--seed",
        "3",
        "--json",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    result = json.loads(done.stdout)
    assert done.returncode == (0 if result["valid"] else 1), done.stderr
    assert (
        result["suite"] == "arith" and result["seed"] == 3 and {"EM", "STRICT", "TPS", "OVT"} <= set(result["headline"])
    )
    assert Path(result["report"]).is_file() and all(
        Path(p).read_bytes().startswith(b"\x89PNG") for p in result["plots"]
    )
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


@pytest.mark.slow
def test_a_killed_run_goes_on_and_equals_one_that_was_not(tmp_path: Path) -> None:
    def command(folder: str) -> list[str]:
        arguments = ["eval", "arith", "--items", "80", "--seed", "1", "--parallel", "4", "--json", "--out", folder]
        return [sys.executable, "-m", "rorqual", *arguments]

    broken = tmp_path / "broken"
    process = subprocess.Popen(command(str(broken)), stdout=subprocess.DEVNULL, env={**os.environ})
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        file = broken / "records.jsonl"
        if file.is_file() and file.read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(read_records(broken / "records.jsonl"))
    assert before < 80, "it was killed too late to show anything"
    again, whole = (
        json.loads(subprocess.run(command(str(folder)), capture_output=True).stdout)
        for folder in (broken, tmp_path / "whole")
    )
    assert len(read_records(broken / "records.jsonl")) == 80 and before >= 10
    for key in ("run_id", "headline", "intervals", "strata", "grades", "baselines"):
        assert again[key] == whole[key], key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_tiny_suite_runs_on_the_bundled_model(minke: LoadedTarget, name: str, tmp_path: Path) -> None:
    if name in ("code", "done"):
        need(("function", "zygote"))
    outcome = evaluate(RunSettings(name, size="tiny"), minke, WORLD, tmp_path)
    result = outcome.result
    assert result["n"] == len(read_records(tmp_path / "records.jsonl")) > 0
    assert report.write(outcome, tmp_path) and (tmp_path / "report.html").is_file()
    assert result["usage"]["completion"] > 0
