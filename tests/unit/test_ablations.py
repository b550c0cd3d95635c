"""The ablation benchmark: its statistics, the equality of its arms, its plan, and a smoke run of all of it."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ablation_arms import STUDIES, TOLERANCE, Settings, arms, at_lr, digest, network, recipe
from ablation_report import render, tables
from ablation_runs import DEPTH, Results, best_lr, config_of, make_job, plan, read_results, search
from ablation_stats import Sample, compare, pooled_sd
from ablation_text import CLAIMS
from depth_study import probe
from small_models import build, config, some_tokens

from rorqual.config import ModelConfig
from rorqual.planner import count_parameters, forward_flops
from rorqual.train.feed import Rows

ROOT = Path(__file__).parents[2]
SETTINGS = Settings()
SEEDS = [0, 1, 2]


def test_a_difference_counts_beyond_two_pooled_standard_deviations() -> None:
    base, variant = Sample({0: 3.00, 1: 3.02, 2: 2.98}), Sample({0: 3.10, 1: 3.16, 2: 3.04})
    both = [v - base.mean for v in base.values.values()] + [v - variant.mean for v in variant.values.values()]
    by_hand = math.sqrt(sum(d * d for d in both) / 4)
    assert pooled_sd(base, variant) == pytest.approx(by_hand)
    found = compare(variant, base)
    assert found.difference == pytest.approx(0.1) and found.units == pytest.approx(0.1 / by_hand)
    assert found.paired_sd == pytest.approx(statistics.stdev([0.10, 0.14, 0.06])) and found.verdict == "higher"
    assert compare(base, variant).verdict == "lower"
    near = Sample({seed: value - 0.05 for seed, value in variant.values.items()})
    assert compare(near, base).verdict == "same"
    alone = compare(Sample({0: 2.0}), base)
    assert alone.verdict == "unknown" and alone.units is None and alone.difference == pytest.approx(-1.0)
    assert compare(Sample({0: 1.0, 1: 1.0}), Sample({0: 2.0, 1: 2.0})).verdict == "lower"
    uneven = pooled_sd(Sample({0: 1.0, 1: 3.0}), Sample({0: 1.0, 1: 1.0, 2: 1.0}))
    assert uneven == pytest.approx(math.sqrt(2 / 3))  # the larger sample weighs more


def test_all_arms_have_the_base_s_forward_flops() -> None:
    base = forward_flops(ModelConfig.preset("minke"), SETTINGS.seq_len)
    for name, arm in arms(SETTINGS).items():
        cfg = network(name, SETTINGS)
        assert forward_flops(cfg, SETTINGS.seq_len).total == pytest.approx(getattr(base, arm.target), rel=TOLERANCE), (
            name
        )
    assert network("v4", SETTINGS) == ModelConfig.preset("minke")
    assert all(not spec.compress_ratio for spec in network("full-attention", SETTINGS).layers)
    assert network("full-attention", SETTINGS).sliding_window >= SETTINGS.seq_len
    sizes = [count_parameters(network(name, SETTINGS)).total for name in ("engram", "v4")]
    assert network("engram", SETTINGS).engram is not None and sizes[0] == pytest.approx(sizes[1], rel=0.001)


def test_recipes_say_what_the_arm_is(tmp_path: Path) -> None:
    for name, arm in arms(SETTINGS).items():
        made = recipe(arm, 1, SETTINGS, tmp_path, tmp_path)
        assert made.model.build() == network(name, SETTINGS), name
        assert made.run.threads == made.run.processes == 1 and made.run.seed == 1
    adamw = recipe(at_lr("adamw", 1e-3, SETTINGS), 0, SETTINGS, tmp_path, tmp_path)
    assert (adamw.optim.matrix_optimizer, adamw.optim.lr, adamw.optim.end_lr) == ("adamw", 1e-3, 1e-4)
    assert at_lr("muon", SETTINGS.lr, SETTINGS).name == "v4"
    assert digest(adamw) != digest(recipe(at_lr("adamw", 2e-3, SETTINGS), 0, SETTINGS, tmp_path, tmp_path))
    assert digest(adamw) == digest(recipe(at_lr("adamw", 1e-3, SETTINGS), 2, SETTINGS, tmp_path / "x", tmp_path))
    for name, residual in DEPTH.items():
        cfg = config_of(name, 0, SETTINGS, tmp_path).model.build()
        assert (cfg.num_hidden_layers, cfg.residual, cfg.hidden_size) == (61, residual, 64)


def finished(arm: str, seed: int, loss: float | None, settings: Settings = SETTINGS) -> tuple[str, dict[str, Any]]:
    key = make_job(arm, seed, settings).key
    line: dict[str, Any] = {"arm": arm, "seed": seed, "key": key}
    if loss is None:
        return key, line | {"failure": "the loss is nan"}
    lr = float(arm.partition("@")[2] or settings.lr)
    return key, line | {
        "nats_per_token": loss, "bits_per_byte": loss / 2, "flops_per_token": 4.4e6, "training_flops_per_token": 6e6,
        "parameters": 5_000_000, "lr": lr, "curve": [[1024 * (i + 1), loss + 3 / (i + 1)] for i in range(20)],
    }  # fmt: skip


def test_the_search_widens_until_the_best_rate_lies_inside() -> None:
    results: Results = {}
    asked = []
    true_loss = {2.5e-4: 4.2, 5e-4: 4.0, 1e-3: 4.1, 2e-3: 4.3, 4e-3: None}
    while todo := plan(["adamw"], SEEDS, SETTINGS, results):
        job = todo[0]
        asked.append((job.arm, job.seed))
        results.update([finished(job.arm, job.seed, true_loss[float(job.arm.partition("@")[2])])])
    rates = [float(arm.partition("@")[2]) for arm, seed in asked if seed == 0]
    assert sorted(rates) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]  # 5e-4 was best and at the edge, so one more was tried
    assert asked[-2:] == [("adamw@0.0005", 1), ("adamw@0.0005", 2)]
    assert best_lr("adamw", 0, SETTINGS, results) == 5e-4
    assert plan(["v4", "muon"], SEEDS, SETTINGS, results)[0].arm == "muon@0.001"
    assert search("muon", 0, SETTINGS, results) == list(SETTINGS.muon_lrs)


def test_finished_runs_are_not_repeated_and_survive_an_interruption(tmp_path: Path) -> None:
    names = ["v4", "plain", "depth-hc"]
    assert [(j.arm, j.seed) for j in plan(names, SEEDS, SETTINGS, {})][:4] == [
        ("v4", 0), ("plain", 0), ("depth-hc", 0), ("v4", 1),
    ]  # fmt: skip
    written, lost = finished("v4", 0, 4.0), finished("plain", 0, 4.1)
    (tmp_path / "results.jsonl").write_text(json.dumps(written[1]) + "\n")
    (tmp_path / "runs" / lost[0]).mkdir(parents=True)
    (tmp_path / "runs" / lost[0] / "result.json").write_text(json.dumps(lost[1]))
    results = read_results(tmp_path)
    assert read_results(tmp_path) == results and len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    left = plan(names, SEEDS, SETTINGS, results)
    assert len(left) == 7 and ("v4", 0) not in [(j.arm, j.seed) for j in left]
    other = Settings(tokens=600_000)
    assert len(plan(names, SEEDS, other, results)) == 9  # another budget is another run
    assert len(plan(names, SEEDS, other, dict([finished("depth-hc", 0, 5.0)]))) == 8  # but the depth study has its own


def test_the_page_says_no_more_than_the_runs(tmp_path: Path) -> None:
    losses = {
        "v4": [4.00, 4.02, 3.98],
        "plain": [4.30, 4.33, 4.28],
        "hc": [4.01, 4.00, 3.99],
        "no-hash": [3.5, 3.5, 3.51],
    }
    results = dict(finished(arm, seed, values[seed]) for arm, values in losses.items() for seed in SEEDS)
    results.update([finished("full-attention", 0, None)])
    found = {table.study: table for table in tables(results, SETTINGS, SEEDS)}
    assert set(found) == {"residual", "hash"} and set(found) < set(STUDIES)
    page = render(results, SETTINGS, SEEDS, {"processor": "a test", "torch": "2"})
    short = page.split("## In short")[1].split("##")[0]
    assert "**Gains** beyond the noise, in nats/token: mHC over a plain sum (+0.303)." in short
    assert "**Losses** beyond the noise: a hash-routed first layer over a learned one (-0.497)." in short
    assert "standard deviations): mHC over unconstrained hyper-connections (+0.000)." in short
    assert "full attention" not in short and "within 2, no claim" in page
    assert "`no-hash`: **better** than `v4` by 0.4967" in page and "`plain`: **worse** than `v4` by 0.3033" in page
    assert {variant for _, variants in STUDIES.values() for variant in variants} == set(CLAIMS)


def test_depth_figures_on_a_stack_whose_gain_is_known() -> None:
    for changes, gain in (({"residual": "hc"}, 1.5**8), ({"residual": "plain", "hc_mult": 1}, 1.0)):
        model = build(config(**changes))
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith("_scale"):
                    tensor.zero_()
                elif name.endswith("_base"):  # every mix is 1.5 times the identity
                    tensor[8:] = 1.5 * torch.eye(4).flatten()
        tokens = some_tokens(model, 2, 24)
        found = probe(model, Rows(tokens, tokens.roll(-1, 1)))
        assert found["forward"][-1] == pytest.approx(gain) and found["backward_largest"][-1] == pytest.approx(gain)
        assert len(found["signal"]) == len(found["weights"]) == 4 and found["gradient"][-1] == 1.0
        assert all(value > 0 for value in found["signal"] + found["weights"] + found["gradient"])
        if gain > 1:
            assert found["forward"][0] == pytest.approx(2.25) and found["signal"][-1] > 5  # two sublayers a layer


@pytest.mark.slow
def test_the_smoke_run_works_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ablations.py"), "--quick", "--json", "--jobs", "2"]
    first = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert {row["peer_name"]: len(row["config"]["values"]["peer"]) for row in rows} == {"plain": 2, "hc": 2, "ngram": 1}
    assert all(row["ratio"] == row["peer"] / row["ours"] and row["config"]["ours"] == "v4" for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == {"v4", "plain", "hc", "adamw@0.002", "ngram", "depth-hc"}
    assert len(lines) == 9 and all(math.isfinite(line["nats_per_token"]) for line in lines)
    assert (tmp_path / "figures" / "ablation_residual.png").exists()
    assert (tmp_path / "figures" / "ablation_depth.png").exists()
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    again = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert again.stdout == first.stdout and "0 running" in again.stderr
