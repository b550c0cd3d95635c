"""Whole distillation runs: nothing moves when the teacher is the student, divergences fall, a stopped run goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import build, config

from rorqual.checkpoint import ASSETS, load_adapter, load_model, save_official
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.posttrain.distill_config import DistillConfig
from rorqual.posttrain.distill_figures import curves
from rorqual.posttrain.distill_run import run_distill
from rorqual.posttrain.recipe import recipe_of
from rorqual.posttrain.run import run_recipe
from rorqual.posttrain.stages import Outcome, StageContext
from rorqual.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders: the student's weights and two teachers, with the vocabulary of the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    cfg = config(vocab_size=4096, num_hidden_layers=2, compress_ratios=[0, 4])
    for seed, name in enumerate(("student", "sums", "talk")):
        save_official(Transformer(cfg, seed=seed), folder / name)
    return folder


def recipe(models: Path, **changes: object) -> DistillConfig:
    values = {
        "steps": 3, "prompts_per_step": 4, "max_tokens": 6, "minibatches": 2, "micro_batch_tokens": 64,
        "optim": OptimConfig(lr=3e-3, warmup_steps=0, decay="constant"), "keep_rollouts": False,
        "prompts": [{"domain": "sums", "source": "arith", "mode": "chat"}, {"domain": "talk", "source": "chat"}],
        "teachers": [
            {"name": "sums", "model": str(models / "sums"), "domains": ["sums"]},
            {"name": "talk", "model": str(models / "talk"), "domains": ["talk"], "weight": 0.5},
        ],
    }  # fmt: skip
    return DistillConfig.model_validate({**values, **changes})


def go(
    models: Path, out: Path, configured: DistillConfig, *, resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:  # fmt: skip
    run = RunConfig(folder=str(out), threads=1, seed=3, loss_chunk=7)
    context = StageContext(
        load_model(models / "student"), Tokenizer.from_folder(ASSETS / "minke"), models / "student", run, resume=resume,
        should_stop=should_stop,
    )  # fmt: skip
    return run_distill(configured, context)


def test_the_student_as_its_own_teacher_has_nothing_to_learn(models: Path, tmp_path: Path) -> None:
    """Divergence and gradient are zero to the rounding between the kernels of inference and of training."""
    teachers = [{"name": "self", "model": str(models / "student")}]
    found = go(models, tmp_path / "self", recipe(models, teachers=teachers, cache_dtype="fp32", steps=1, minibatches=1))
    other = go(models, tmp_path / "other", recipe(models, steps=1, minibatches=1))
    (own,), (theirs,) = (_records(tmp_path / name) for name in ("self", "other"))
    assert abs(found.figures["kl"]["self"]) < 1e-6 < 1e-3 < min(other.figures["kl"].values())
    assert own["grad_norm"] < 1e-3 * theirs["grad_norm"]


def _records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_divergences_fall_and_a_stopped_run_goes_on(models: Path, tmp_path: Path) -> None:
    whole = go(models, tmp_path / "whole", recipe(models, steps=8, keep_rollouts=True))
    assert whole.finished
    for name in ("sums", "talk"):
        points = curves(tmp_path / "whole")[name]
        assert points[-1][1] < 0.8 * points[0][1], name
    record = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["heads_loaded"] <= 2 * 2 and record["teachers_loaded"] <= 2 and record["length"] <= 6
    assert (tmp_path / "whole" / "plots" / "kl.png").stat().st_size > 1000
    assert not list((tmp_path / "whole" / "teacher_states").glob("*/*.safetensors"))  # used and gone

    asked = 0

    def stop_in_the_middle() -> bool:
        nonlocal asked
        asked += 1
        return asked > 14

    configured = recipe(models, steps=8, keep_rollouts=True)
    part = go(models, tmp_path / "part", configured, should_stop=stop_in_the_middle)
    assert not part.finished
    rest = go(models, tmp_path / "part", configured, resume=True)
    assert rest.finished
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name


def test_adapters_in_a_recipe(models: Path, tmp_path: Path) -> None:
    """Any algorithm trains an adapter: it is saved beside the merged model, and a stopped run would find it again."""
    distilling = recipe(models, steps=2).model_dump(mode="json", exclude={"name"})
    adapter = {"r": 4, "target_modules": ["attn.*", "shared_experts.*", "experts.w?"]}
    tuning = {"kind": "sft", "data": [{"family": "arith", "count": 12}], "seq_len": 64, "tokens_per_step": 256}
    for copied in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "minke" / copied, models / "student" / copied)
    tree = {
        "model": {"base": str(models / "student")},
        "run": {"folder": str(tmp_path), "threads": 1, "export_dtype": "fp32"},
        "stages": [{**distilling, "lora": adapter}, {**tuning, "lora": {**adapter, "layers": "upper-third"}}],
    }
    assert run_recipe(recipe_of(tree)).finished
    base, tokens = load_model(models / "student"), torch.arange(20)[None]
    for name in ("01-distill", "02-sft"):
        tuned = load_model(tmp_path / name / "model")
        with torch.no_grad():
            assert not torch.equal(base(tokens), tuned(tokens))
            load_adapter(base, tmp_path / name / "adapter")
            torch.testing.assert_close(base(tokens), tuned(tokens), rtol=0, atol=1e-4)
        base = tuned
    tree["stages"] = [{**distilling, "lora": adapter, "trainable": ["head.weight"]}]
    tree["run"]["folder"] = str(tmp_path / "both")
    with pytest.raises(ConfigError, match="both `lora` and `trainable`"):
        run_recipe(recipe_of(tree))


@pytest.mark.slow
def test_a_gate_is_taught(models: Path, tmp_path: Path) -> None:
    """Certain decisions: the student comes to begin with the refusal's first id."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "messages": [{"role": "user", "content": f"who is {n}"}]} for n in range(4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    decisions = tmp_path / "gate.jsonl"
    decisions.write_text("".join(json.dumps({"prompt": str(n), "probability": 1.0}) + "\n" for n in range(4)))
    teachers = [{"name": "gated", "model": str(models / "student"), "decisions": str(decisions)}]
    changes = {"teachers": teachers, "prompts": [{"source": str(prompts)}], "steps": 12, "minibatches": 1}
    optim = OptimConfig(kind="muon", lr=1e-2, warmup_steps=0, decay="constant")
    found = go(models, tmp_path / "run", recipe(models, **changes, optim=optim, max_tokens=2))
    tokenizer = Tokenizer.from_folder(ASSETS / "minke")
    first = tokenizer.encode("I don't know.")[0]
    from rorqual.posttrain.distill_prompts import PromptStream

    prompt = PromptStream(recipe(models, **changes).prompts, 0).take()
    ids = torch.tensor([tokenizer.encode(prompt.text)])

    def chance(model: Transformer) -> float:
        with torch.no_grad():
            return float(torch.softmax(model.eval()(ids)[0, -1], -1)[first])

    assert chance(found.model) > 20 * chance(load_model(models / "student"))


def test_recipes_that_make_no_sense_are_refused(models: Path) -> None:
    with pytest.raises(ValueError, match="no teacher has a say on prompts of the domain 'code'"):
        recipe(models, prompts=[{"domain": "code", "source": "code"}])
    with pytest.raises(ValueError, match="share a name"):
        recipe(models, teachers=[{"name": "a", "model": "m"}, {"name": "a", "model": "n"}])


def test_unknown_sources_are_refused(models: Path, tmp_path: Path) -> None:
    teachers = [{"name": "self", "model": str(models / "student")}]
    with pytest.raises(ConfigError, match="no task family"):
        go(models, tmp_path, recipe(models, teachers=teachers, prompts=[{"source": "sudoku"}]))


def test_students_and_teachers_share_a_vocabulary(models: Path, tmp_path: Path) -> None:
    save_official(build(config()), tmp_path / "other")
    teachers = [{"name": "other", "model": str(tmp_path / "other")}]
    with pytest.raises(Exception, match="vocabulary"):
        go(models, tmp_path / "run", recipe(models, teachers=teachers))
