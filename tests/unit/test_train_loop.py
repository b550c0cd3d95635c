"""The loop on a tiny model and invented tokens: resuming, stopping, refusing, and the run folder."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TinyFeed, newest_files, records, tiny_config, tiny_run
from torch import Tensor

from rorqual.errors import CheckpointError, ConfigError, DataError, RorqualError
from rorqual.tokenizer import Tokenizer, train_tokenizer
from rorqual.train import Result, TrainConfig, load_config, train
from rorqual.train.corpus_feed import build_corpus_feed
from rorqual.train.device import check_device

VARIED = ("schedule.seq_lens=[[0.0, 16], [0.5, 32]]", "run.eval_every=5")


def config(folder: Path, *settings: str) -> TrainConfig:
    return tiny_config(folder, *VARIED, *settings)


def run(folder: Path, *settings: str, **kwargs: Any) -> Result:
    return tiny_run(folder, *VARIED, *settings, **kwargs)


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(folder) if "loss" in r]


def test_a_run_learns_and_leaves_everything_it_should(tmp_path: Path) -> None:
    result = run(tmp_path, 'run.sample_prompts=["a"]', "run.sample_tokens=3")
    assert result.finished and (result.step, result.tokens) == (10, 640)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found >= {
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "samples.txt",
        "checkpoints/step-00000010/state.json",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    }
    losses = losses_of(tmp_path)
    assert [step for step, _ in losses] == list(range(1, 11))
    assert losses[-1][1] < losses[0][1] - 0.3
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["torch"] == torch.__version__ and env["seed"] == 0
    held_out = result.held_out["invented"]
    assert held_out["bits_per_byte"] == pytest.approx(held_out["nats_per_token"] / 2 / 0.6931472)
    assert load_config([tmp_path / "config.toml"]) == config(
        tmp_path, 'run.sample_prompts=["a"]', "run.sample_tokens=3"
    )


def test_first_loss_is_that_of_guessing(tmp_path: Path) -> None:
    run(tmp_path, "run.max_steps=1")
    assert records(tmp_path)[0]["lm"] == pytest.approx(torch.tensor(48.0).log().item(), rel=0.01)


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "whole")
    partial = run(tmp_path / "cut", f"run.max_steps={stop}")
    assert not partial.finished and partial.model_folder is None
    run(tmp_path / "cut", resume=True)
    assert newest_files(tmp_path / "cut") == newest_files(tmp_path / "whole")
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_can_be_continued(tmp_path: Path, number: signal.Signals) -> None:
    feed = TinyFeed()
    feed.before = lambda step: signal.raise_signal(number) if step == 3 else None
    handler = signal.getsignal(number)
    result = run(tmp_path / "cut", feed=feed)
    assert signal.getsignal(number) == handler
    assert not result.finished and result.step == 4  # the step in progress was completed
    run(tmp_path / "cut", resume=True)
    run(tmp_path / "whole")
    assert newest_files(tmp_path / "cut") == newest_files(tmp_path / "whole")


def test_global_settings_of_torch_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run(tmp_path, "run.max_steps=1")
    assert torch.get_num_threads() == before and not torch.are_deterministic_algorithms_enabled()


def test_changed_settings_are_refused_unless_allowed(tmp_path: Path) -> None:
    run(tmp_path, "run.max_steps=2")
    with pytest.raises(ConfigError, match=r"(?s)differ from.*optim.lr: 0.002 -> 0.01.*--allow-changes"):
        run(tmp_path, "optim.lr=0.01", resume=True)
    result = run(tmp_path, "optim.lr=0.01", "run.log_every=2", resume=True, allow_changes=True)
    assert result.finished


def test_folder_in_use_and_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        run(tmp_path / "nothing", resume=True)
    run(tmp_path / "used", "run.max_steps=1")
    with pytest.raises(ConfigError, match="already holds a run.*--resume"):
        run(tmp_path / "used")


def test_a_loss_that_is_not_finite_stops_the_run_without_saving(tmp_path: Path, monkeypatch: Any) -> None:
    from rorqual.train import losses

    real = losses.cross_entropy_sum

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs) * float("nan")

    run(tmp_path, "run.max_steps=2")
    monkeypatch.setattr(losses, "cross_entropy_sum", broken)
    with pytest.raises(RorqualError, match=r"The loss at step 3 is nan.*Lower optim.lr"):
        run(tmp_path, resume=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_unreadable_corpus_is_reported_by_name(tmp_path: Path) -> None:
    (tmp_path / "image.txt").write_bytes(b"abc\x00\x01")
    with pytest.raises(DataError, match=r"image.txt is a binary file"):
        train(config(tmp_path / "run", f'data.sources=[{{kind="path", path="{tmp_path / "image.txt"}"}}]'))
    with pytest.raises(DataError, match=r"absent.txt does not exist"):
        train(config(tmp_path / "run", f'data.sources=[{{kind="path", path="{tmp_path / "absent.txt"}"}}]'))


def test_unknown_task_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello " * 100)
    settings = [
        f'data.sources=[{{kind="path", path="{tmp_path / "a.txt"}"}}]',
        "data.tasks={weight=1.0, families={juggling=1.0}}",
    ]
    with pytest.raises(ConfigError, match="'juggling', which is not a task family.*Choose from .*arith, .*hop"):
        train(config(tmp_path / "run", *settings))


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    class Untouchable(TinyFeed):
        def __init__(self) -> None:
            raise AssertionError("the data was built")

    absent = "xpu" if not torch.accelerator.is_available() else "meta"
    for name, message in (("cpux", "'cpux', which torch does not know"), (absent, "of accelerators this torch finds")):
        with pytest.raises(ConfigError, match=f"{message}.*Set run.device=cpu"):
            train(config(tmp_path / "run", f"run.device={name}"), build_feed=lambda *_: Untouchable())
    assert not (tmp_path / "run").exists()


def test_each_process_needs_an_accelerator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert check_device("cuda", 1) == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"2 processes are to share 1 of 'cuda'.*Use at most 1 processes"):
        check_device("cuda", 2)
    with pytest.raises(ConfigError, match=r"'cuda:1', but .* finds 1 of type cuda"):
        check_device("cuda:1", 1)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert check_device("cuda", 2) == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"'cuda:1' for 2 processes.*Set run.device=cuda"):
        check_device("cuda:1", 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_training_on_an_accelerator_can_be_stopped_and_continued(tmp_path: Path) -> None:
    here = torch.accelerator.current_accelerator()
    assert here is not None
    run(tmp_path, f"run.device={here.type}", "run.max_steps=3")
    assert run(tmp_path, f"run.device={here.type}", resume=True).finished
    losses = losses_of(tmp_path)
    assert [step for step, _ in losses] == list(range(1, 11)) and losses[-1][1] < losses[0][1] - 0.3


def test_only_damaged_checkpoints_are_no_reason_to_start_over(tmp_path: Path) -> None:
    run(tmp_path, "run.max_steps=2")
    (tmp_path / "checkpoints/step-00000002/state.json").unlink()
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints.*can be read"):
        run(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path)


def test_the_printed_command_continues_after_max_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my run"
    run(folder, "run.max_steps=2", progress="rich")
    assert f"--run-dir '{folder}'" in capsys.readouterr().out.replace("\n", "")
    kept = load_config([folder / "config.toml"])
    assert kept.run.max_steps is None
    assert train(kept, resume=True, build_feed=lambda *_: TinyFeed()).finished


def test_settings_that_cannot_be_built_do_not_replace_the_recipe(tmp_path: Path) -> None:
    run(tmp_path, "run.max_steps=2")
    before = (tmp_path / "config.toml").read_text()

    def fail(*_: Any) -> TinyFeed:
        raise DataError("the data changed")

    with pytest.raises(DataError):
        train(config(tmp_path, "optim.lr=0.01"), resume=True, allow_changes=True, build_feed=fail)
    assert (tmp_path / "config.toml").read_text() == before


def test_resuming_before_the_first_checkpoint_keeps_to_the_recipe(tmp_path: Path) -> None:
    run(tmp_path, "run.max_steps=1")
    (tmp_path / "checkpoints/step-00000001").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"(?s)differ from those of .*config.toml:.*optim.lr: 0.002 -> 0.01"):
        run(tmp_path, "optim.lr=0.01", resume=True)
    assert run(tmp_path, resume=True).finished


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"file.* cannot hold a run: .*Choose another --run-dir"):
            run(folder)
    monkeypatch.setattr("rorqual.train.run_folder.os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot hold a run: it is not writable"):
        run(tmp_path / "locked")


def test_samples_need_no_held_out_text_and_no_unknown_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyFeed, "held_out", lambda *_: iter(()))
    run(tmp_path, 'run.sample_prompts=["a"]', "run.sample_tokens=3")
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("--- a") == 2
    ids = [int(i) for line in text.splitlines() if line.startswith("[") for i in line.strip("[]").split(",")]
    assert ids and max(ids) < 6


def corpus_config(folder: Path, corpus: Path, *settings: str) -> TrainConfig:
    source = f'data.sources=[{{kind="path", path="{corpus}"}}]'
    more = ["model.overrides.vocab_size=1024", "data.held_out=0.2", "run.max_steps=1"]
    return config(folder, source, *more, *settings)


def test_tokenizers_of_other_runs_and_of_first_weights(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"the whale number {number} sings\n" * 20)
    train(corpus_config(tmp_path / "first", corpus, "run.max_steps=20"))
    own = (tmp_path / "first/tokenizer.json").read_text()
    other = Tokenizer.from_file(tmp_path / "first/tokenizer.json")

    # a stale one in the folder of a new run is put aside
    (tmp_path / "second").mkdir()
    stale = train_tokenizer(["other words altogether"] * 9, 1024)
    stale.save(tmp_path / "second")
    train(corpus_config(tmp_path / "second", corpus))
    assert (tmp_path / "second/tokenizer.json").read_text() == own
    assert (tmp_path / "second/tokenizer.json.old").read_text() == stale.to_json()

    # weights bring theirs along, and the exported dtype is no other architecture
    first = tmp_path / "first/model"
    train(corpus_config(tmp_path / "third", corpus, f'model.init_from="{first}"', "data.tokenizer_digits=3"))
    assert Tokenizer.from_folder(tmp_path / "third").fingerprint == other.fingerprint
    (first / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"model.init_from names .* no tokenizer.json"):
        train(corpus_config(tmp_path / "fourth", corpus, f'model.init_from="{first}"'))


def test_token_counts_leave_padding_out(tmp_path: Path) -> None:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": "ab " * n}, {"role": "assistant", "content": "c"}]})
        for n in range(1, 30)
    ]
    (tmp_path / "chat.records").write_text("\n".join(lines))  # kind decides, not the suffix
    source = f'data.sources=[{{kind="jsonl", path="{tmp_path / "chat.records"}"}}]'
    settings = config(tmp_path / "run", source, "model.overrides.vocab_size=1024", "schedule.total_tokens=2048")
    feed = build_corpus_feed(settings, settings.model.build(), tmp_path / "run", is_new=True)
    counted, rows = feed.token_counts(), feed.next_rows(64, 32)
    assert rows.lengths is not None and min(rows.lengths) < 32
    assert counted.sum() == sum(rows.lengths)
    full = rows.lengths.index(32)
    assert rows.part(full, full + 1).lengths is None
