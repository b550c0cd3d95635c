"""Examples into rows: each once, as full as can be, invisible to each other, and no answer cut silently."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build, config, drawn, gap, some_tokens

from rorqual.errors import DataError
from rorqual.posttrain.example_store import ExampleStore
from rorqual.posttrain.examples import Example
from rorqual.posttrain.packing import FitReport, best_fit, build_rows, fit, micro_batches, plan_epoch
from rorqual.train.losses import IGNORE

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.lists(st.integers(1, 50), max_size=60))
@drawn(100)
def test_best_fit(lengths: list[int]) -> None:
    bins = best_fit(lengths, 50)
    assert sorted(place for row in bins for place in row) == list(range(len(lengths)))
    fill = [sum(lengths[place] for place in row) for row in bins]
    assert max(fill, default=0) <= 50
    assert sum(full <= 25 for full in fill) <= 1, "two half-empty rows would have been one"


def test_an_epoch_has_every_example_once() -> None:
    lengths = [1 + (7 * n) % 40 for n in range(300)]
    learned = [n for n in range(300) if n % 5]
    plans = [plan_epoch(lengths, learned, 64, seed=1, epoch=e, packed=True) for e in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for plan in plans:
        assert sorted(n for row in plan for n in row) == learned
        assert max(sum(lengths[n] for n in row) for row in plan) <= 64
    assert len(plans[0]) <= 1.05 * sum(lengths[n] for n in learned) / 64 + 1
    single = plan_epoch(lengths, learned, 64, seed=1, epoch=0, packed=False)
    assert all(len(row) == 1 for row in single) and sorted(n for [n] in single) == learned


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    model = build(config())
    lengths = [5, 21, 13, 34]
    rows = [some_tokens(model, n, draw_seed=n).tolist() for n in lengths]
    examples = [Example(row, [i % 3 == 0 for i in range(len(row))]) for row in rows]
    store = ExampleStore.build(tmp_path, examples, {})
    packed = build_rows(store, [[0, 1], [3, 2]], pad_token_id=0)
    assert packed.tokens.shape == (2, 47) and packed.lengths == (26, 47)
    with torch.no_grad():
        logits = model(packed.tokens, segment_ids=packed.segment_ids, lengths=packed.lengths)
        for row, start, number in ((0, 0, 0), (0, 5, 1), (1, 0, 3), (1, 34, 2)):
            n = lengths[number]
            assert gap(logits[row, start : start + n], model(torch.tensor([rows[number]]))[0]) < 1e-4
            labels = packed.labels[row, start : start + n].tolist()
            assert labels == [rows[number][i + 1] if i + 1 < n and (i + 1) % 3 == 0 else IGNORE for i in range(n)]
    assert (packed.labels[0, 26:] == IGNORE).all()


def test_micro_batches_hold_every_row_and_little_more_than_their_tokens(tmp_path: Path) -> None:
    store = ExampleStore.build(tmp_path, [Example([n] * n, [True] * n) for n in range(2, 40)], {})
    rows = [[n] for n in range(len(store))]
    parts = micro_batches(store, rows, 100, 0)
    assert sum(part.tokens.shape[0] for part in parts) == len(rows)
    assert all(part.tokens.numel() <= 100 for part in parts)
    assert [int(row[0]) for part in parts for row in part.tokens] == list(range(2, 40))


def example(pattern: str, **more: object) -> Example:
    """`.` is given, any other letter is learned."""
    return Example(list(range(len(pattern))), [c != "." for c in pattern], "here:1", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "kept", "lost"),
    [
        ("..aa..bbbb", "..aa", 1),  # the second answer reaches over the edge of 8
        ("..aaaa..bb", "..aaaa", 1),  # it begins behind it
        ("..aa.bbb..c", "..aa.bbb", 1),  # an answer ends exactly there
        ("..aa......b.c", "..aa", 2),
        (".......aaa", "", 0),  # nothing whole is left
        ("aaaaaaaaaa", "", 0),
    ],
)
def test_no_cut_answer_is_learned(pattern: str, kept: str, lost: int) -> None:
    report = FitReport()
    found = list(fit([example(pattern)], 8, "trim", report))
    assert [len(e) for e in found] == ([len(kept)] if kept else [])
    assert (report.trimmed, report.dropped) == ((1, 0) if kept else (0, 1)) and report.lost_answers == lost
    for part in found:
        assert part.loss_mask == [c != "." for c in kept] and part.ids == list(range(len(kept)))


def test_long_examples_are_counted_or_refused() -> None:
    report = FitReport()
    many = [example("..aa"), example("..aa..bbbb"), example("....")]
    assert len(list(fit(many, 8, "drop", report))) == 1
    assert (report.examples, report.tokens, report.learned_tokens, report.dropped) == (1, 4, 2, 1)
    with pytest.raises(DataError, match="here:1 has 10 ids"):
        list(fit(many, 8, "refuse", FitReport()))


@given(st.integers(1, 60), st.integers(2, 20))
@drawn(40)
def test_plain_text_is_split_without_losing_a_prediction(length: int, seq_len: int) -> None:
    report = FitReport()
    parts = list(fit([example("." + "a" * length, is_splittable=True)], seq_len, "drop", report))
    assert all(len(part) <= seq_len for part in parts)
    predicted = [
        i for part in parts for i, is_learned in zip(part.ids[1:], part.loss_mask[1:], strict=True) if is_learned
    ]
    assert predicted == list(range(1, length + 1)) and report.learned_tokens == length


def test_a_store_that_is_not_whole_is_no_store(tmp_path: Path) -> None:
    def broken() -> Iterator[Example]:
        yield example("..aa")
        raise RuntimeError("killed")

    ExampleStore.build(tmp_path, [example("..aa")], {"origin": "x"})
    again = ExampleStore(tmp_path)
    assert again.facts == {"origin": "x"} and again.read(0)[1].tolist() == [False, False, True, True]
    with pytest.raises(RuntimeError):
        ExampleStore.build(tmp_path, broken(), {})
    with pytest.raises(DataError, match="does not hold whole examples"):
        ExampleStore(tmp_path)
