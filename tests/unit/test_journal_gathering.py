"""Tokens one by one that share a record, commits that gather for a time, and nobody left waiting or reading twice."""

import asyncio
import os
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from journal_disks import Gate, HookedDisk, QuietDisk

from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, Reader, Tokens, reader, replay_folder
from rorqual.journal.tokens import MOST_TOKENS, encode_tokens, tokens_layout

LONG_S = 3600.0


def until_durable(journal: Journal, lsn: int) -> None:
    """Wait, without asking for a commit."""
    end = time.monotonic() + 30
    while journal.durable_lsn < lsn:
        assert time.monotonic() < end, "nobody committed"
        time.sleep(0.001)


def ids_of(folder: Path) -> dict[int, list[int]]:
    """Token ids by request; positions must be without a gap."""
    found: dict[int, list[int]] = {}
    for _, record in replay_folder(folder):
        if isinstance(record, Tokens):
            mine = found.setdefault(record.request, [])
            assert record.first_position == len(mine)
            mine += record.ids
    return found


def test_tokens_of_a_stream_share_a_record_until_it_is_committed(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        for position in range(5):
            for request in (1, 2):
                assert journal.append_token(request, position, 7, 100 * request + position, -0.5 * position) == request
        assert journal.durable_lsn == 0
        assert journal.commit() == 2 == journal.durable_lsn
        assert journal.append_token(1, 5, 7, 105, -2.5) == 3, "what is durable grows no more"
        assert journal.durable_lsn == 2
    logprobs = (0.0, -0.5, -1.0, -1.5, -2.0)
    assert [record for _, record in replay_folder(tmp_path / "j")] == [
        Tokens(1, 0, 7, (100, 101, 102, 103, 104), logprobs),
        Tokens(2, 0, 7, (200, 201, 202, 203, 204), logprobs),
        Tokens(1, 5, 7, (105,), (-2.5,)),
    ]


def test_a_record_takes_no_token_that_does_not_follow(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        assert journal.append_token(1, 0, 7, 10, -0.5) == 1
        assert journal.append_token(1, 2, 7, 12, -0.5) == 2, "a gap"
        assert journal.append_token(1, 3, 8, 13, -0.5) == 3, "another policy"
        assert journal.append_token(1, 3, 8, 14, -0.5) == 4, "a position again, as after a rollback"
        assert journal.append(Event("between")) == 5
        assert journal.append_token(1, 4, 8, 15, -0.5) == 6, "the order of records is the order of calls"
        assert journal.append_many([Event("a"), Event("b")]) == 8
        assert journal.append_token(1, 5, 8, 16, -0.5) == 9
    kinds = [type(record).__name__ for _, record in replay_folder(tmp_path / "j")]
    assert kinds == ["Tokens"] * 4 + ["Event", "Tokens", "Event", "Event", "Tokens"]


def test_a_record_holds_no_more_tokens_than_its_count_can_say(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        for position in range(MOST_TOKENS + 2):
            journal.append_token(1, position, 0, position, -0.5)
        assert journal.last_lsn == 2
    assert ids_of(tmp_path / "j") == {1: list(range(MOST_TOKENS + 2))}


def test_a_refused_token_leaves_no_trace(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        wrong: tuple[tuple[object, ...], ...] = (
            (1, 0, 0, 2**32, -0.5), (1, 0, 0, -1, -0.5), (1, 0, 0, 5, "likely"), (1, 0, 0, 5, 1e300),
            (1, -1, 0, 5, -0.5), (1, 0, 2**32, 5, -0.5), (2**64, 0, 0, 5, -0.5), ("one", 0, 0, 5, -0.5),
        )  # fmt: skip
        for values in wrong:
            with pytest.raises(JournalError, match="a Tokens record of request .* cannot be stored"):
                journal.append_token(*values)  # type: ignore[arg-type]
        assert journal.last_lsn == 0
        journal.append_token(1, 0, 0, 17, -0.5)
        for token, logprob in ((2**32, -0.5), (18, "likely"), (18, None)):
            with pytest.raises(JournalError, match="cannot be stored"):
                journal.append_token(1, 1, 0, token, logprob)  # type: ignore[arg-type]
        assert journal.append_token(1, 1, 0, 18, -1.0) == 1
    assert [record for _, record in replay_folder(tmp_path / "j")] == [Tokens(1, 0, 0, (17, 18), (-0.5, -1.0))]
    with pytest.raises(JournalError, match="is closed. Open it anew"):
        journal.append_token(1, 2, 0, 19, -0.5)


def test_a_token_that_comes_while_its_record_is_written_waits_for_the_next(tmp_path: Path) -> None:
    disk, gate = HookedDisk(), Gate()
    journal = Journal(tmp_path / "j", disk=disk)
    disk.before = gate
    first = journal.append_token(1, 0, 0, 10, -0.5)
    thread = threading.Thread(target=journal.commit)
    thread.start()
    assert gate.reached.wait(10)
    second = journal.append_token(1, 1, 0, 11, -0.5)
    assert second > first
    gate.open()
    thread.join(10)
    assert first == journal.durable_lsn < second, "acknowledged is what was synced and no more"
    assert ids_of(tmp_path / "j") == {1: [10]}
    journal.close()
    assert ids_of(tmp_path / "j") == {1: [10, 11]}


def test_streams_of_many_threads_lose_no_token(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", segment_bytes=4000, disk=QuietDisk()) as journal:

        def run(request: int) -> None:
            for position in range(200):
                lsn = journal.append_token(request, position, 0, position, -1.0)
                if position % (request + 2) == 0:
                    assert journal.commit() >= lsn
                journal.commit_soon(within_s=0.002)

        threads = [threading.Thread(target=run, args=(request,)) for request in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ids_of(tmp_path / "j") == dict.fromkeys(range(6), list(range(200)))


@pytest.mark.parametrize("count", [1, 2, 33])
def test_a_cut_record_of_several_tokens_counts_for_nothing(tmp_path: Path, count: int) -> None:
    """Torn at any byte: the tokens of the commit before are there, and none of the record that was not acknowledged."""
    journal = Journal(tmp_path / "j", disk=QuietDisk())
    journal.append_token(1, 0, 0, 1, -0.5)
    journal.commit()
    segment = next((tmp_path / "j").glob("*.seg"))
    start, state = journal._offset, (tmp_path / "j" / "state").read_bytes()
    for position in range(1, 1 + count):
        journal.append_token(1, position, 0, position, -0.5)
    journal.commit()
    end = journal._offset
    data = segment.read_bytes()
    journal.discard()
    for cut in sorted({start, start + 1, *Random(count).sample(range(start, end), min(12, end - start)), end - 1, end}):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / "state").write_bytes(state)
        (folder / segment.name).write_bytes(data[:cut] + bytes(len(data) - cut))
        with Journal(folder, disk=QuietDisk()) as again:
            assert again.durable_lsn == (2 if cut == end else 1)
            assert sum(len(r.ids) for _, r in again.replay() if isinstance(r, Tokens)) == (
                1 + count if cut == end else 1
            )


def test_a_commit_gathers_for_a_time_and_comes_without_being_asked_again(tmp_path: Path) -> None:
    disk = HookedDisk()
    with Journal(tmp_path / "j", disk=disk) as journal:
        for position in range(200):
            journal.append_token(1, position, 0, position, -0.5)
            journal.commit_soon(within_s=0.2)
        until_durable(journal, journal.last_lsn)
        assert disk.num_synced < 200, "they shared syncs"
        lsn = journal.append_token(1, 200, 0, 200, -0.5)
        journal.commit_soon(within_s=0.01)
        until_durable(journal, lsn)
        end = time.monotonic() + 30
        while journal._own_committer()._pace_s is not None:
            assert time.monotonic() < end, "the thread goes on although nothing comes"
            time.sleep(0.01)
        lsn = journal.append_token(1, 201, 0, 201, -0.5)
        journal.commit_soon(within_s=0.01)
        until_durable(journal, lsn)
    assert ids_of(tmp_path / "j") == {1: list(range(202))}


def test_enough_records_or_a_shorter_time_end_the_gathering(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        for position in range(4):
            journal.append(Tokens(1, position, 0, (position,), (-0.5,)))
            assert journal.durable_lsn == 0
            journal.commit_soon(at_least=4, within_s=LONG_S)
        until_durable(journal, 4)
        for ask in (lambda: journal.commit_soon(within_s=0.01), journal.commit_soon):
            lsn = journal.append(Event("more"))
            journal.commit_soon(within_s=LONG_S)
            ask()
            until_durable(journal, lsn)
        lsn = journal.append(Event("more"))
        journal.commit_soon(within_s=LONG_S)
        assert asyncio.run(journal.acommit()) == lsn
        lsn = journal.append(Event("more"))
        journal.commit_soon(within_s=LONG_S)
        assert journal.commit() == lsn
        journal.append(Event("last"))
        journal.commit_soon(within_s=LONG_S)
    assert [lsn for lsn, _ in replay_folder(tmp_path / "j")] == list(range(1, 10)), "closing waits for nothing"


def test_nobody_waits_for_a_thread_that_has_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", disk=QuietDisk())
    journal.append(Event("begin"))
    assert asyncio.run(journal.acommit()) == 1
    committer = journal._own_committer()
    journal.close()
    with pytest.raises(JournalError, match="is closed. Open it anew"):
        asyncio.run(asyncio.wait_for(committer.wait(), 10))
    with pytest.raises(JournalError, match="is closed. Open it anew"):
        committer.ask()


def test_waiters_get_an_answer_whenever_the_journal_is_closed(tmp_path: Path) -> None:
    async def run(turn: int) -> list[int | BaseException]:
        journal = Journal(tmp_path / f"{turn}", disk=QuietDisk())
        journal.append(Event("begin"))
        await journal.acommit()
        closing = threading.Thread(target=journal.close)
        tasks = []
        for number in range(40):
            if number == turn:
                closing.start()
            tasks.append(asyncio.create_task(journal.acommit()))
            await asyncio.sleep(0)
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        closing.join()
        return answers

    for turn in range(0, 40, 4):
        answers = asyncio.run(run(turn))
        assert all(answer == 1 or isinstance(answer, JournalError) for answer in answers)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_does_not_wait_for_its_parents_thread(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        journal.append(Event("begin"))
        journal.commit_soon()
        until_durable(journal, 1)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                asyncio.run(asyncio.wait_for(journal.acommit(), 10))
            except JournalError as error:
                code = 7 if "append in the process that opened it" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        journal.append(Event("parent"))
        assert asyncio.run(journal.acommit()) == 2


def test_a_reader_at_the_end_reads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int | None] = []
    read_segment = reader.read_segment

    def watched(segment: object, since: int, end: object, start: reader.Place | None) -> object:
        starts.append(None if start is None else start.lsn)
        return read_segment(segment, since, end, start)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "read_segment", watched)
    with Journal(tmp_path / "j", disk=QuietDisk()) as journal:
        journal.append_many([Event("before", {"n": n}) for n in range(20)])
        journal.commit()
        with Reader(tmp_path / "j", since=20) as follower, Reader(tmp_path / "j", since=25) as ahead:
            for _ in range(3):
                assert list(follower.poll()) == list(ahead.poll()) == []
            assert starts == []
            for lsn in range(21, 28):
                journal.append(Event("after", {"n": lsn}))
                assert list(follower.poll()) == [], "not durable"
                journal.commit()
                assert list(follower.poll()) == [(lsn, Event("after", {"n": lsn}))]
                assert list(ahead.poll()) == ([(lsn, Event("after", {"n": lsn}))] if lsn > 25 else [])
            assert starts == [21, 22, 23, 24, 25, 26, 26, 27, 27], "each time from where the last reading ended"


def test_the_length_of_a_tokens_record_is_said_in_one_place() -> None:
    random = Random(3)
    lengths, counts, flags = [], [], []
    for _ in range(200):
        count = random.randint(1, 40)
        logprobs = random.choice([None, (-0.5,) * count])
        mask, routing = (random.choice([None, random.randbytes(16)]) for _ in range(2))
        lengths.append(len(encode_tokens(Tokens(1, 0, 0, (1,) * count, logprobs, mask, routing))))
        counts.append(count)
        flags.append((logprobs is not None) + 2 * (mask is not None) + 4 * (routing is not None))
    assert [tokens_layout(*pair)[2] for pair in zip(counts, flags, strict=True)] == lengths
    assert tokens_layout(np.array(counts), np.array(flags))[2].tolist() == lengths
