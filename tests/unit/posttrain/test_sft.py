"""Supervised fine-tuning as a run: what is learned, what is held out, going on after a stop, and its model folder."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from little_model import CONFIG, little_model
from mock_model import byte_tokenizer
from safetensors.torch import load_file

import rorqual
from rorqual.checkpoint import save_transformers
from rorqual.errors import ConfigError, DataError
from rorqual.model import Transformer
from rorqual.posttrain import run as runner
from rorqual.posttrain.recipe import Recipe, recipe_of
from rorqual.posttrain.run import RunResult, run_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["ab", "cd", "ef", "gh"]


def chat(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Questions whose answer is their own word, in upper case."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            word = draw.choice(WORDS)
            talk = [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]
            file.write(json.dumps({"messages": talk * draw.randint(1, 2)}) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return little_model(tmp_path_factory.mktemp("base"))


def recipe(base: Path, folder: Path, rows: Path, *, stages: int = 1, **stage: Any) -> Recipe:
    one = {
        "kind": "sft", "data": [{"path": str(rows)}], "seq_len": 64, "tokens_per_step": 128,
        "optim": {"lr": 1e-2, "warmup_steps": 0, "kind": "muon"}, **stage,
    }  # fmt: skip
    run = {"folder": str(folder), "threads": 1, "export_dtype": "fp32"}
    return recipe_of({"model": {"base": str(base)}, "run": run, "stages": [one] * stages})


def records(result: RunResult, stage: str = "01-sft") -> list[dict[str, Any]]:
    return records_in(result.folder / stage)


def records_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    assert result.model_folder is not None
    return load_file(result.model_folder / "model.safetensors")


def same(one: RunResult, other: RunResult) -> None:
    """Weights and metrics of both runs are equal to the bit, but for what is timed."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    timed = {"tokens_per_s", "peak_memory_bytes"}
    first, second = ([{k: v for k, v in r.items() if k not in timed} for r in records(x)] for x in (one, other))
    assert first == second


def end_after(monkeypatch: pytest.MonkeyPatch, steps: int, *, dies: bool) -> None:
    """After so many looks at whether it is to stop the run is asked to, or dies on the spot."""
    left = iter(range(steps))
    kind = runner.StageContext

    def look() -> bool:
        if next(left, None) is not None:
            return False
        if dies:
            raise InterruptedError("dead")
        return True

    def stopping(*given: Any) -> Any:
        return kind(*given[:6], look)

    monkeypatch.setattr(runner, "StageContext", stopping)


def test_it_learns_to_answer(base: Path, tmp_path: Path) -> None:
    result = run_recipe(recipe(base, tmp_path / "run", chat(tmp_path / "a.jsonl", 40), epochs=10, mtp=0.1))
    steps = [r for r in records(result) if "lm" in r]
    assert steps[0]["lm"] > 3 and steps[-1]["lm"] < 0.5
    assert steps[0]["mtp"] > 0 and steps[0]["balance"] > 0 and steps[0]["index"] > 0
    model, tokenizer = rorqual.load(result.model_folder)
    prompts = [
        tokenizer.encode(rorqual.chat.encode_messages([{"role": "user", "content": word}], thinking_mode="chat"))
        for word in WORDS
    ]
    with rorqual.Engine(model, tokenizer) as engine:
        said = engine.generate(prompts, rorqual.SamplingParams(temperature=0, max_tokens=4))
    assert [s.text for s in said] == [word.upper() for word in WORDS]
    assert (result.folder / "01-sft" / "plots" / "loss.png").is_file()


def test_stopped_anywhere_it_goes_on_to_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = chat(tmp_path / "a.jsonl")
    how: dict[str, Any] = {"epochs": 2, "validation_share": 0.2, "eval_every": 2, "bias_speed": 0.01}
    whole = run_recipe(recipe(base, tmp_path / "whole", data, **how))
    assert whole.finished and len([r for r in records(whole) if "lm" in r]) >= 5
    broken = recipe(base, tmp_path / "broken", data, **how)
    with monkeypatch.context() as patch:
        end_after(patch, 1, dies=False)
        assert not run_recipe(broken).finished
    # Of what follows a checkpoint nothing counts: neither metrics nor a validation that was the best so far.
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        end_after(patch, 3, dies=True)
        run_recipe(broken, resume=True)
    assert len(records_in(tmp_path / "broken" / "01-sft")) > 3
    with monkeypatch.context() as patch:
        end_after(patch, 2, dies=False)
        assert not run_recipe(broken, resume=True).finished
    assert run_recipe(broken, resume=True).finished
    same(whole, run_recipe(broken, resume=True))  # all is done


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    """`kill -9` of the command wherever it happens to be, twice, with checkpoints all the time."""
    how: dict[str, Any] = {"epochs": 5, "validation_share": 0.2, "eval_every": 3, "bias_speed": 0.01}
    data = chat(tmp_path / "a.jsonl")
    whole = run_recipe(recipe(base, tmp_path / "whole", data, **how))
    broken = recipe(base, tmp_path / "broken", data, **how)
    (tmp_path / "broken.toml").write_text(broken.to_toml())
    words = ["--recipe", str(tmp_path / "broken.toml"), "--set", "run.checkpoint_minutes=1e-6", "--quiet"]
    for steps, more in ((2, []), (7, ["--resume"])):
        child = subprocess.Popen([sys.executable, "-m", "rorqual", "posttrain", *words, *more])
        while len(records_in(tmp_path / "broken" / "01-sft")) < steps:
            assert child.poll() is None, "it ended by itself"
            time.sleep(0.002)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert run_recipe(broken, resume=True).finished
    same(whole, RunResult(tmp_path / "broken", tmp_path / "broken" / "01-sft" / "model", {}, True))


def test_the_best_model_is_kept_and_a_worse_ends_training(base: Path, tmp_path: Path) -> None:
    """The held-out answers are others than the learned ones, so learning these makes those ever worse."""
    held_out = tmp_path / "held_out.jsonl"
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "zz"}]
    held_out.write_text(json.dumps({"messages": talk}) + "\n")
    result = run_recipe(
        recipe(
            base, tmp_path / "run", chat(tmp_path / "a.jsonl"), epochs=30, eval_every=1, patience=3,
            validation=[{"path": str(held_out)}],
        )
    )  # fmt: skip
    losses = [r["held_out_loss"] for r in records(result) if "held_out_loss" in r]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3
    figures = result.stages["01-sft"]
    assert figures["best_step"] == best + 1 and figures["held_out_loss"] == min(losses)
    model, _ = rorqual.load(result.model_folder)
    ids = torch.tensor([byte_tokenizer().encode(rorqual.chat.encode_messages(talk, thinking_mode="chat"))])
    with torch.no_grad():
        found = torch.log_softmax(model(ids), -1)[0, -4:-1].gather(-1, ids[0, -3:, None])
    assert float(-found.mean()) == pytest.approx(min(losses), abs=1e-4)


def test_stages_follow_each_other_and_finished_ones_are_passed_over(base: Path, tmp_path: Path) -> None:
    data = chat(tmp_path / "a.jsonl", 8)
    two = recipe(base, tmp_path / "run", data, stages=2)
    result = run_recipe(two)
    assert list(result.stages) == ["01-sft", "02-sft"] and result.model_folder == tmp_path / "run" / "02-sft" / "model"
    first = load_file(tmp_path / "run" / "01-sft" / "model" / "model.safetensors")
    assert any(not torch.equal(value, weights(result)[name]) for name, value in first.items())
    before = (tmp_path / "run" / "01-sft" / "metrics.jsonl").stat().st_mtime_ns
    (tmp_path / "run" / "02-sft" / "done.json").unlink()
    assert run_recipe(two, resume=True).finished
    assert (tmp_path / "run" / "01-sft" / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="already holds a run"):
        run_recipe(two)
    with pytest.raises(ConfigError, match="settings of stage 0 are not those"):
        run_recipe(recipe(base, tmp_path / "run", data, stages=2, epochs=2), resume=True)
    with pytest.raises(ConfigError, match="the run began from"):
        run_recipe(recipe(tmp_path / "run" / "01-sft" / "model", tmp_path / "run", data, stages=2), resume=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        run_recipe(recipe(base, tmp_path / "other", data), resume=True)


def test_only_what_is_named_is_trained_from_the_transformers_layout(tmp_path: Path) -> None:
    model = Transformer(CONFIG, seed=3)
    save_transformers(model, tmp_path / "hf", dtype=torch.float32)
    byte_tokenizer().save(tmp_path / "hf")
    result = run_recipe(
        recipe(tmp_path / "hf", tmp_path / "run", chat(tmp_path / "a.jsonl", 8), trainable=["head.weight"])
    )
    after = rorqual.load(result.model_folder)[0].state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, after[name])]
    assert moved == ["head.weight"]


def test_a_family_as_data(base: Path, tmp_path: Path) -> None:
    made = recipe(base, tmp_path / "run", Path("unused"), data=[{"family": "chat", "count": 3}], seq_len=1024)
    assert run_recipe(made).stages["01-sft"]["examples"] == 3
    with pytest.raises(ConfigError, match="no task family 'cooking'"):
        run_recipe(recipe(base, tmp_path / "other", Path("x"), data=[{"family": "cooking", "count": 1}]))


def test_what_cannot_be_run_is_refused(base: Path, tmp_path: Path) -> None:
    data = chat(tmp_path / "a.jsonl", 4)
    with pytest.raises(DataError, match="nothing is left to learn: 4 examples were longer"):
        run_recipe(recipe(base, tmp_path / "a", data, seq_len=8))
    for changes, why in (
        ({"data": []}, "data is empty"),
        ({"patience": 2}, "patience needs validation"),
        ({"lr": 1}, "stages.0.lr: there is no such setting"),
        ({"data": [{"family": "chat"}]}, "say the count"),
        ({"kind": "dpo"}, "no algorithm here"),
        ({"optim": {"lr": -1}}, "stages.0.optim.lr"),
    ):
        with pytest.raises(ConfigError, match=why):
            recipe(base, tmp_path / "x", data, **changes)
    with pytest.raises(ConfigError, match="no stages"):
        run_recipe(recipe_of({"run": {"folder": str(tmp_path / "x")}}))
