"""lm-evaluation-harness and inspect_ai, unmodified, run our tasks against our server (`recipes/harnesses`).

What they report must be what the engine itself gets on the same items with the same grader.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from live_server import live

from rorqual import load
from rorqual.data.tasks import families
from rorqual.data.tasks.base import Item
from rorqual.engine import Engine, SamplingParams
from rorqual.server import create_app

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "harnesses"
COUNT = 32


@pytest.fixture(scope="module")
def minke() -> Iterator[tuple[Engine, str]]:
    with Engine(*load("minke")) as engine, live(create_app(engine, "minke")) as url:
        yield engine, f"{url}/v1"


def ours(engine: Engine, items: list[Item]) -> float:
    """The share of items that the engine answers right, greedily."""
    answers = engine.generate([i.prompt_text() for i in items], SamplingParams(temperature=0, max_tokens=256))
    grades = [families()[i.family].grade(i, a.text) for i, a in zip(items, answers, strict=True)]
    return sum(grade.passed for grade in grades) / len(items)


def run(program: str, *arguments: str, **settings: str) -> str:
    """Run a harness's command without network."""
    command = [str(Path(sys.executable).parent / program), *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline, **settings}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def lm_eval(folder: Path, model: str, url: str, tasks: str, *more: str, seed: int, **options: Any) -> dict[str, Any]:
    given = {"model": "minke", "base_url": url, "num_concurrent": 4, "tokenized_requests": False, **options}
    run(
        *("lm-eval", "run", "--model", model, "--model_args", ",".join(f"{k}={v}" for k, v in given.items())),
        *("--include_path", str(RECIPES / "lm_eval"), "--tasks", tasks, "--output_path", str(folder)),
        *("--metadata", json.dumps({"count": COUNT, "seed": seed}), *more),
        HF_HOME=str(folder),
    )
    [report] = folder.rglob("results_*.json")
    results: dict[str, Any] = json.loads(report.read_text())["results"]
    return results


def test_lm_eval_completions(minke: tuple[Engine, str], tmp_path: Path) -> None:
    engine, url = minke
    tasks = ("facts", "arith", "tool")
    names = ",".join(f"rorqual_{task}" for task in tasks)
    results = lm_eval(tmp_path, "local-completions", f"{url}/completions", names, seed=5, tokenizer_backend=None)
    for task in tasks:
        items = list(islice(families()[task].items("test", 5), COUNT))
        assert results[f"rorqual_{task}"]["correct,none"] == pytest.approx(ours(engine, items))


def test_lm_eval_likelihoods(minke: tuple[Engine, str], tmp_path: Path) -> None:
    """Prompt log-probabilities (`echo`): Minke finds the right one of four values far more often than chance does."""
    folder = ROOT / "rorqual" / "assets" / "minke"
    model = {"tokenizer": str(folder), "tokenizer_backend": "huggingface"}
    task = "rorqual_facts_choice"
    results = lm_eval(tmp_path, "local-completions", f"{minke[1]}/completions", task, seed=1, **model)
    assert results[task]["acc,none"] > 0.5


def test_lm_eval_chat(minke: tuple[Engine, str], tmp_path: Path) -> None:
    url = f"{minke[1]}/chat/completions"
    task = "rorqual_code_chat"
    results = lm_eval(tmp_path, "local-chat-completions", url, task, "--apply_chat_template", seed=2)
    assert results[task]["correct,none"] > 0.8  # 100 % of 150 in docs/minke.md


def test_inspect(minke: tuple[Engine, str], tmp_path: Path) -> None:
    """Its accuracy is ours on the same questions, asked in chat mode."""
    engine, url = minke
    family = families()["facts"]
    plain = (i for i in family.items("test", 3) if i.thinking_mode == "chat" and not i.tools)
    items = list(islice(plain, 24))
    run(
        *("inspect", "eval", f"{RECIPES / 'inspect' / 'families.py'}@facts", "--model", "openai-api/rorqual/minke"),
        *("-T", "count=24", "-T", "seed=3", "--max-connections", "4", "--display", "plain", "--log-format", "json"),
        *("-T", "thinking=disabled"),
        RORQUAL_BASE_URL=url,
        RORQUAL_API_KEY="none",
        INSPECT_LOG_DIR=str(tmp_path),
    )
    [log] = tmp_path.glob("*.json")
    report = json.loads(log.read_text())
    assert report["status"] == "success" and len(report["samples"]) == 24
    [score] = report["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] == pytest.approx(ours(engine, items))
