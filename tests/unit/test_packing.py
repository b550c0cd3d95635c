"""Packing and the loader: labels, segments, shares, shape changes, prefetch and refused states."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from rorqual.data import IGNORE, Batch, Document, PackedLoader
from rorqual.errors import DataError

PAD = 2


class FakeSource:
    """Documents whose tokens tell where they belong: BOS, then index * 1000 + position + 10."""

    def __init__(self, name: str, length: Callable[[int], int], *, splittable: bool, fingerprint: str = "f") -> None:
        self.name, self.fingerprint, self.has_splittable = name, fingerprint, splittable
        self._length = length

    def documents(self, seed: int, index: int) -> list[Document]:
        n = self._length(index)
        ids = np.concatenate([[0], index * 1000 + 10 + np.arange(n)]).astype(np.int64)
        mask = np.ones(n + 1, dtype=np.bool_)
        mask[0] = False
        mask[1::5] = False
        return [Document(ids, mask, self.has_splittable)]


def long_text(name: str = "long") -> FakeSource:
    return FakeSource(name, lambda i: 5 + (i * 37) % 150, splittable=True)


def short_chat(name: str = "chat") -> FakeSource:
    return FakeSource(name, lambda i: 3 + (i * 11) % 40, splittable=False)


def loader(*sources: FakeSource, **options: object) -> PackedLoader:
    settings: dict = {"seq_len": 64, "batch_size": 4, "seed": 1, "pad_token_id": PAD} | options
    return PackedLoader(sources, **settings)


def segments(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of each segment, padding included."""
    for tokens, labels, ids in zip(batch.tokens, batch.labels, batch.segment_ids, strict=True):
        assert ids[0] == 0 and set((ids[1:] - ids[:-1]).tolist()) <= {0, 1}
        for i in range(int(ids[-1]) + 1):
            yield tokens[ids == i].tolist(), labels[ids == i].tolist()


def test_shapes_and_types() -> None:
    batch = next(loader(long_text()))
    assert batch.tokens.shape == batch.labels.shape == batch.segment_ids.shape == (4, 64)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.segment_ids.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert batch.num_targets == int((batch.labels != IGNORE).sum()) > 0
    assert torch.equal(batch.to("cpu").tokens, batch.tokens)


def test_labels_are_the_next_token_of_the_same_segment() -> None:
    for batch in islice(loader(long_text(), short_chat()), 5):
        for tokens, labels in segments(batch):
            assert labels[-1] == IGNORE
            for position, label in enumerate(labels[:-1]):
                target = tokens[position + 1]
                masked = target < 10 or (target - 10) % 1000 % 5 == 0
                assert label == (IGNORE if masked else target)


def test_whole_documents_stay_whole_and_gaps_are_filled_with_text() -> None:
    padded = 0
    for batch in islice(loader(long_text(), short_chat()), 20):
        padded += int((batch.tokens == PAD).sum())
    assert padded == 0
    chat_only = loader(short_chat())
    seen: list[int] = []
    share = 0.0
    for batch in islice(chat_only, 20):
        share += float((batch.tokens == PAD).float().mean()) / 20
        for tokens, labels in segments(batch):
            if tokens[0] == PAD:
                assert set(tokens) == {PAD} and set(labels) == {IGNORE}
                continue
            assert tokens[0] == 0
            index = (tokens[1] - 10) // 1000
            assert len(tokens) == 1 + 3 + (index * 11) % 40
            seen.append(index)
    assert share < 0.08  # rows here hold three documents each
    assert len(seen) == len(set(seen)) and set(range(len(seen) - 10)) <= set(seen)


def test_shares_are_of_tokens() -> None:
    data = loader(long_text("a"), short_chat("b"), short_chat("c"), weights={"a": 6, "b": 2})
    list(islice(data, 40))
    served = data.state_dict()["packer"]["served"]
    assert abs(served[0] / sum(served) - 0.75) < 0.02 and served[2] == 0


def test_weights_and_shape_change_between_batches() -> None:
    for prefetch in (0, 3):
        data = loader(long_text("a"), short_chat("b"), prefetch=prefetch)
        next(data)
        data.set_seq_len(32)
        data.set_batch_size(2)
        data.set_weights({"b": 1.0})
        assert (data.seq_len, data.batch_size) == (32, 2)
        assert next(data).tokens.shape == (2, 32)
        state = data.state_dict()
        following = next(data)
        other = loader(long_text("a"), short_chat("b"))
        other.load_state_dict(json.loads(json.dumps(state)))
        assert torch.equal(next(other).tokens, following.tokens)
        assert (other.seq_len, other.batch_size, other.num_batches) == (32, 2, data.num_batches)
        before = data.state_dict()
        data.set_weights({"b": 7.0})  # the same shares
        assert data.state_dict() == before
        data.close()


def test_prefetching_changes_nothing() -> None:
    with loader(long_text(), short_chat(), prefetch=4) as ahead:
        for step, (a, b) in enumerate(zip(ahead, loader(long_text(), short_chat()), strict=False)):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
            if step == 6:
                break


def test_errors_of_a_source_reach_the_reader() -> None:
    def fail(index: int) -> int:
        if index > 3:
            raise DataError("the disk is gone")
        return 50

    for prefetch in (0, 2):
        with loader(FakeSource("a", fail, splittable=True), prefetch=prefetch) as data:
            for _ in range(2):
                with pytest.raises(DataError, match="the disk is gone"):
                    list(islice(data, 10))


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(DataError, match="Each needs a name of its own"):
        loader(long_text(), long_text())
    with pytest.raises(DataError, match="at least one"):
        loader()
    for weights in ({"lang": 1.0}, {"long": -1.0}, {"long": 0.0}, {"long": float("nan")}):
        with pytest.raises(DataError, match=r"do not fit the sources \['long'\].*Fix: correct"):
            loader(long_text(), weights=weights)
    with pytest.raises(DataError, match="A batch of 4 rows of 1 tokens cannot be packed"):
        loader(long_text(), seq_len=1)
    with pytest.raises(DataError, match="A batch of 0 rows"):
        loader(long_text()).set_batch_size(0)


def test_states_of_other_data_are_refused() -> None:
    state = loader(long_text(), short_chat()).state_dict()
    cases = [
        (loader(long_text(), short_chat(), seed=2), "has seed 1, this run has 2"),
        (loader(short_chat(), long_text()), "has order of sources"),
        (
            loader(long_text(), FakeSource("chat", len, splittable=False, fingerprint="g")),
            "data of chat changed",
        ),  # type: ignore[arg-type]
    ]
    for other, message in cases:
        with pytest.raises(DataError, match=message):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="has format version 99, this run has 1"):
        loader(long_text(), short_chat()).load_state_dict(state | {"version": 99})


def test_state_stays_small() -> None:
    data = loader(long_text(), short_chat(), batch_size=16)
    rng = random.Random(0)
    for _ in range(30):
        data.set_seq_len(rng.choice([32, 64, 128]))
        next(data)
    assert len(json.dumps(data.state_dict())) < 2000
