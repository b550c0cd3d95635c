"""Any record comes back from its bytes as it was, alone, through a journal, and through columns."""

import struct
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from journal_disks import QuietDisk

from rorqual.journal import Event, Journal, Reader, Record, Tokens, ToolResult, compact, replay_folder
from rorqual.journal.records import RECORDS, decode, encode
from rorqual.journal.segments import list_segments

u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts
plain = st.recursive(
    scalars | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
BY_NAME: dict[str, st.SearchStrategy[Any]] = {
    "key": st.binary(min_size=16, max_size=16),
    "seed_key": st.binary(min_size=16, max_size=16),
    "output": st.binary(max_size=100),
    "output_digest": st.binary(max_size=32),
    "prompt_digest": st.binary(max_size=32),
    "ids_digest": st.binary(max_size=32),
    "observation_ids": st.lists(u32, max_size=5).map(tuple),
    "sampling": st.dictionaries(texts, plain, max_size=3),
    "totals": st.dictionaries(texts, plain, max_size=3),
    "fields": st.dictionaries(texts, plain, max_size=4),
    "values": st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    "exit_code": st.none() | st.integers(-(2**31), 2**31),
    "tier": st.sampled_from([None, "A", "B", "C"]),
    "external": st.booleans(),
    "replayed": st.booleans(),
}
BY_TYPE: dict[str, st.SearchStrategy[Any]] = {"int": u64, "str": texts, "int | None": st.none() | u64}


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    count = draw(st.sampled_from([1, 1, 2, 5]))
    reference = st.none() | st.binary(min_size=16, max_size=16)
    logprobs = st.lists(st.floats(width=32, allow_nan=False), min_size=count, max_size=count).map(tuple)
    return Tokens(
        draw(u64),
        draw(u32),
        draw(u32),
        tuple(draw(st.lists(u32, min_size=count, max_size=count))),
        draw(st.none() | logprobs),
        draw(reference),
        draw(reference),
    )


def others(cls: type[Record]) -> st.SearchStrategy[Record]:
    kinds = {name: str(getattr(kind, "__name__", kind)) for name, kind in cls.__annotations__.items() if name != "TYPE"}
    return st.builds(cls, **{name: BY_NAME[name] if name in BY_NAME else BY_TYPE[kind] for name, kind in kinds.items()})


records = st.one_of(tokens(), tokens(), *(others(cls) for cls in RECORDS if cls is not Tokens))


@settings(max_examples=200, deadline=None)
@given(records)
def test_a_record_comes_back_from_its_payload(record: Record) -> None:
    assert decode(record.TYPE, encode(record)) == record


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(RECORDS), st.binary(max_size=80))
def test_any_payload_is_a_record_or_refused(cls: type[Record], payload: bytes) -> None:
    try:
        record = decode(cls.TYPE, payload)
    except ValueError:
        return
    assert type(record) is cls


def test_the_layout_of_tokens_is_the_written_one() -> None:
    packed = encode(Tokens(7, 5, 3, (1, 2), (-0.5, -0.25), mask=b"m" * 16))
    assert packed == struct.pack("<QIHHI2I2f16s", 7, 5, 2, 0b11, 3, 1, 2, -0.5, -0.25, b"m" * 16)
    assert encode(Tokens(7, 5, 3, (9,), (-0.5,))) == struct.pack("<QIHHIIf", 7, 5, 1, 1, 3, 9, -0.5)
    assert encode(Tokens(7, 5, 3, (9,))) == struct.pack("<QIHHII", 7, 5, 1, 0, 3, 9)


@settings(max_examples=40, deadline=None)
@given(st.lists(records, max_size=30), st.integers(1, 7), st.integers(200, 3000), st.integers(0, 30))
def test_any_records_come_back_from_a_journal(
    given_records: list[Record], batch: int, segment_bytes: int, cut: int
) -> None:
    """Through batches, segments, an opening in between, a reader beside, and columns."""
    expected = list(enumerate(given_records, 1))
    with tempfile.TemporaryDirectory() as home:
        folder, seen = Path(home) / "j", []
        for part in (given_records[:cut], given_records[cut:]):
            with Journal(folder, segment_bytes=segment_bytes, disk=QuietDisk()) as journal:
                reader = Reader(folder, journal.durable_lsn)
                for start in range(0, len(part), batch):
                    journal.append_many(part[start : start + batch])
                    journal.commit()
                    seen += list(reader.poll())
                assert list(journal.replay()) == expected[: journal.durable_lsn]
                reader.close()
        assert seen == expected == list(replay_folder(folder))
        done = compact(folder, disk=QuietDisk())
        closed = {getattr(r, "request", None) for r in given_records if type(r).__name__ == "Close"} | {None}
        every = {getattr(r, "request", None) for r in given_records}
        assert set(done.open_requests) == every - closed
        if every <= closed:
            assert all(segment.is_columnar for segment in list_segments(folder).segments[:-1])
        assert list(replay_folder(folder)) == expected


def test_lists_stay_lists_and_observations_tuples() -> None:
    event = Event("x", {"list": [1, [2]], "nothing": None})
    assert decode(Event.TYPE, encode(event)) == event
    result = ToolResult(1, 0, bytes(16), observation_ids=(4, 5))
    back = decode(ToolResult.TYPE, encode(result))
    assert isinstance(back, ToolResult) and back.observation_ids == (4, 5)
