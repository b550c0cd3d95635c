"""Reports: self-contained pages from what a run wrote, with roll-backs told apart from what was kept."""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run

from rorqual.cli import main
from rorqual.errors import ConfigError
from rorqual.train import run_plots, run_report
from rorqual.train.run_records import RunRecords, read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "a run & more"
    tiny_run(path, "run.report=true", "run.eval_every=5")
    return path


def images(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_a_run_leaves_a_page_that_needs_nothing_else(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = images(page)
    assert len(found) == len(run_plots.FIGURES) and all(png[:4] == b"\x89PNG" for png in found)
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "@import" not in page
    for title, *_ in run_plots.FIGURES:
        assert html.escape(title) in page
    for text in ("a run &amp; more", "Held-out text", "schedule.total_tokens", "processor", "seed", "640"):
        assert text in page


def test_undone_steps_are_kept_apart(tmp_path: Path) -> None:
    lines = [{"step": s, "tokens": s * 10, "lm": 5.0 - s / 10} for s in range(1, 9)]
    lines += [{"step": 8, "tokens": 80, "held_out_loss": 4.0, "held_out": {}}]
    lines += [{"event": "spike", "step": 8, "onset": 7}, {"event": "rollback", "step": 5, "from_step": 8}]
    lines += [{"step": s, "tokens": s * 10, "lm": 4.0 - s / 10} for s in range(6, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "cut')
    run = read_run(tmp_path)
    assert [r["step"] for r in run.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in run.undone] == [6, 7, 8] and run.evaluations == []
    assert run.series("lm")[1][-2:] == [3.4, 3.3]
    assert "rollback" in run_report.write_report(tmp_path).read_text()


def test_nested_figures_are_found() -> None:
    steps: list[dict[str, Any]] = [
        {"step": 1, "tokens": 2_000_000, "health": {"clamp": {"b": 1.0}}},
        {"step": 2, "tokens": 0},
    ]
    run = RunRecords(Path("none"), steps=steps)
    assert run.series("health", "clamp", "b") == ([2.0], [1.0])
    assert run.keys("health", "clamp") == ["b"] and run.keys("absent") == []


def test_a_network_of_many_layers_has_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    violation = {f"layers.{i}.ffn.gate": i / 100 for i in range(122)}
    lines = [{"step": s, "tokens": s * 10, "lm": 3.0, "max_violation": violation} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(images(run_report.write_report(tmp_path).read_text(encoding="utf-8"))) >= 2


def test_several_runs_are_laid_over_each_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    tiny_run(tmp_path / "faster", "optim.lr=0.01", "run.eval_every=5")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--compare", str(tmp_path / "faster"), "--compare", str(folder)])
    assert not ended.value.code
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "faster" / "compare.html"
    page = path.read_text(encoding="utf-8")
    assert "optim.lr" in page and "0.01" in page and "0.002" in page and "data.tokenizer" not in page
    assert len(images(page)) == len(run_plots.COMPARED)


def test_the_report_can_be_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.html").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--report", str(folder)])
    assert not ended.value.code and capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()


def test_without_matplotlib_the_tables_remain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    page = run_report.write_report(folder).read_text()
    assert "pip install &quot;rorqual[plots]&quot;" in page and not images(page) and "Held-out text" in page


def test_folders_without_a_run_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read .*metrics.jsonl.*Name the folder of a run"):
        run_report.write_report(tmp_path)
    with pytest.raises(ConfigError, match="A comparison of 1 run"):
        run_report.write_comparison([folder])


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "lm": 3.0}\n')
    (tmp_path / "report.html").mkdir()
    reporter = run_report.Reporter(tmp_path, is_on=True)
    reporter.write(is_last=True)
    with pytest.raises(ConfigError, match="Cannot write .*report.html"):
        run_report.write_report(tmp_path)


def test_a_drawing_library_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: RunRecords) -> None:
        raise ValueError("left cannot be >= right")

    monkeypatch.setattr(run_plots, "figures", fail)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "lm": 3.0}\n')
    run_report.Reporter(tmp_path, is_on=True).write(is_last=True)
    with pytest.raises(ValueError, match="left cannot be"):
        run_report.write_report(tmp_path)
