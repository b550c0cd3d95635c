"""`rorqual selftest`: it passes where bits are promised, and each of its checks sees the fault it is there for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rorqual.cli import build_app
from rorqual.engine import selftest
from rorqual.engine.exactness import examine
from rorqual.engine.selftest import caches, engines, needle, residues
from rorqual.engine.selftest.report import Check, SubjectReport
from rorqual.model import State, Transformer
from rorqual.model.pages import PagePool
from rorqual.ops.native import load

pytestmark = pytest.mark.skipif(load() is None, reason="no C compiler on this machine: only the references exist")
CACHES = {name: run for name, _, run in caches.checks()}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return selftest.high_entropy(selftest.small_config())


@pytest.fixture(scope="module")
def row(model: Transformer) -> residues.Row:
    """Prompts of 129, 160, 191, 222 and 253 tokens."""
    return residues.new_row(model, 0, 129, 31)


def run(row: residues.Row, name: str) -> Check:
    check = Check(name, "")
    (residues.CHECKS[name][1] if name in residues.CHECKS else CACHES[name])(row, check)
    return check


@pytest.mark.parametrize("name", [*residues.CHECKS, *CACHES])
def test_a_check_passes(row: residues.Row, name: str, one_thread: None) -> None:
    check = run(row, name)
    assert check.passed and check.cases >= 10, check.first


def test_every_residue_is_met() -> None:
    lengths = range(129, 129 + residues.BLOCK)
    assert {n % 128 for n in lengths} == set(range(128))
    assert {n % 4 for n in range(129, 129 + residues.BLOCK, 11)} == set(range(4))


FAULTS: dict[str, tuple[type, str, Any]] = {
    "fork": (State, "fork", lambda self: self),
    "truncate": (State, "truncate", lambda self, length: None),
    "snapshot": (Transformer, "restore", lambda self, data: self.new_state()),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_is_seen(row: residues.Row, name: str, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    owner, method, wrong = FAULTS[name]
    monkeypatch.setattr(owner, method, wrong)
    check = run(row, name)
    assert not check.passed and check.first is not None and "129 tokens" in check.first


@pytest.mark.parametrize("name", ["cache, memory, full", "cache, disk, zero"])
def test_wrong_pages_are_seen(row: residues.Row, name: str, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A cache that hands out entries of which one bit is wrong."""
    real = caches.PrefixCache.begin

    def begin(self: Any, *args: Any) -> Any:
        lease = real(self, *args)
        if lease.num_cached:
            assert isinstance(self.pool, PagePool)
            self.pool.tensor(1, "entries").view(torch.int32).bitwise_xor_(1 << 12)
        return lease

    monkeypatch.setattr(caches.PrefixCache, "begin", begin)
    assert not run(row, name).passed


def test_engines_and_their_control(model: Transformer, one_thread: None) -> None:
    check = Check("engine", "")
    truth = engines.schedules(model, check, 6, 8, 3)
    assert check.passed and check.cases == 12 and len(truth) == 6
    check.same_ids([1, 2, 4], [1, 2, 3], "here")
    assert check.first == "here: token 2 differs"


def test_drafts_change_no_token(model: Transformer, one_thread: None) -> None:
    check = Check("drafts", "")
    engines.drafts(model, check, 4, 12, 3)
    assert check.passed and check.cases == 8, check.first
    assert int(str(check.note).split()[0]) > 10


def test_needles_are_found_only_by_an_indexer_that_looks_for_them(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    check = Check("needle", "")
    needle.needles(model, check, step=43)
    assert check.passed and check.cases >= 15, check.first
    monkeypatch.setattr(needle, "teach", lambda model: model)
    blind = Check("needle", "")
    needle.needles(model, blind, step=21)
    assert not blind.passed and "was not picked" in str(blind.first)


def test_digests_are_compared_with_earlier_ones(model: Transformer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "selftest.json"
    reports = [SubjectReport("x", examine(model), digest) for digest in ("aa", "aa", "bb")]
    for report in reports:
        selftest.compare(report, "x 0", path)
    assert [report.passed for report in reports] == [True, True, False]
    assert "the digest was aa" in str(reports[2].checks[0].first)
    path.write_text("{")
    selftest.compare(reports[0], "x 0", path)
    assert len(json.loads(path.read_text())) == 1


@pytest.mark.parametrize(("dtype", "weights", "cache_format"), [("bf16", None, "auto"), ("fp32", "fp4", "fp8")])
def test_what_is_served_packed_or_in_bf16_is_tested_so(
    dtype: str, weights: str | None, cache_format: str, one_thread: None
) -> None:
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    subject = selftest.small_network(0, precision, weights, cache_format)
    facts = examine(subject)
    assert facts.dtype == dtype and (weights is None or weights in facts.weights)
    assert subject.cfg.cache_format == cache_format
    small = residues.new_row(subject, 0, residues.BLOCK + 1, 31)
    check = Check("prompts", "")
    residues.prompts(small, check)
    assert check.passed and check.cases == 10, check.first


def test_another_model_of_the_same_name_is_not_compared_with_the_first() -> None:
    """A run that was trained further, or the same one packed, has other bits by right."""
    models = [selftest.small_network(seed, torch.float32, None, None) for seed in (0, 0, 1)]
    models.append(selftest.small_network(0, torch.float32, "int8", None))
    names = [selftest.identity(model) for model in models]
    assert names[0] == names[1] and len(set(names)) == 3


def test_the_command_fails_where_something_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str, model: Transformer, *_: Any, **__: Any) -> SubjectReport:
        bad = Check("fork", "from a fork", cases=3)
        bad.same(torch.zeros(2, 4), torch.eye(2, 4), "at 5")
        return SubjectReport(name, examine(model), "aa", [bad])

    monkeypatch.setattr(selftest, "examine_model", found)
    monkeypatch.setattr(selftest, "control", lambda model: Check("control", "", cases=2, differences=1))
    options = ["selftest", "--model", "none", "--record", str(tmp_path / "r.json")]
    shown = CliRunner().invoke(build_app(["selftest"]), options)
    assert shown.exit_code == 1
    assert "1 of 4; the first: at 5: logits differ by up to 1 in row 0 of 2" in " ".join(shown.output.split())
    machine = CliRunner().invoke(build_app(["selftest"]), [*options, "--json"])
    body = json.loads(machine.output)
    assert machine.exit_code == 1 and not body["passed"] and body["control"] == {"requests": 2, "differing": 1}


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    options = ["selftest", "--quick", "--json", "--record", str(tmp_path / "r.json"), "--threads", "1"]
    shown = CliRunner().invoke(build_app(["selftest"]), options)
    body = json.loads(shown.output)
    assert shown.exit_code == 0 and body["passed"]
    assert [one["model"] for one in body["models"]] == ["small random network", "minke"]
    assert all(len(one["digest"]) == 16 for one in body["models"])
