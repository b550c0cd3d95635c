"""`rorqual journal`: show, verify, compact, and their refusals; the keys of tool calls."""

import json
from pathlib import Path
from typing import Any

import pytest
from journal_disks import QuietDisk, some_records

from rorqual.cli import main
from rorqual.errors import JournalError
from rorqual.journal import Event, Journal, ToolResult, call_key, canonical


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[Any]:
    code, out = run(capsys, *words, "--json")
    assert code == 0, out
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Journal(tmp_path / "j", segment_bytes=3000, disk=QuietDisk()) as journal:
        for record in some_records(60):
            journal.append(record)
            journal.commit()
        journal.append(ToolResult(9, 0, bytes(16), output=b"\x1b[2J\xff"))
        journal.append(Event("SAID", {"text": "\x1b]0;title\x07 caf\u00e9"}))
    return tmp_path / "j"


def test_show_prints_a_line_a_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(capsys, "journal", "show", folder)
    assert [line["lsn"] for line in shown] == list(range(1, 63))
    assert shown[0]["record"] == "Request" and shown[0]["sampling"] == {"temperature": 0.7}
    assert shown[60]["output"] == {"hex": b"\x1b[2J\xff".hex()}
    assert [line["lsn"] for line in lines(capsys, "journal", "show", folder, "--since", 58, "--limit", 2)] == [59, 60]
    assert {line["request"] for line in lines(capsys, "journal", "show", folder, "--request", 1)} == {1}
    assert [line["lsn"] for line in lines(capsys, "journal", "show", folder, "--kind", "SAID")] == [62]
    assert len(lines(capsys, "journal", "show", folder, "--kind", "ToolCall")) == 3
    code, text = run(capsys, "journal", "show", folder)
    assert code == 0 and len(text.splitlines()) == 62
    assert text.isascii() and "\x1b" not in text, "what tools printed never reaches the terminal as it is"
    assert "No such records" in run(capsys, "journal", "show", folder, "--request", 77)[1]


def test_verify_says_what_is_whole_and_what_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "journal", "verify", folder)
    assert code == 0 and "62 records to LSN 62" in text and "Everything is whole." in text
    (report,) = lines(capsys, "journal", "verify", folder)
    assert report["ok"] and report["records"]["ToolResult"] == 4 and report["last_lsn"] == 62
    segment = sorted(folder.glob("*.seg"))[1]
    data = bytearray(segment.read_bytes())
    data[90] ^= 1
    segment.write_bytes(data)
    code, text = run(capsys, "journal", "verify", folder)
    assert code == 1 and f"{segment.name} is damaged at byte 64" in text and "It is not whole." in text
    code, text = run(capsys, "journal", "show", folder, "--json")
    assert code == 1 and "JournalError" in text and json.loads(text.splitlines()[0])["lsn"] == 1


def test_verify_tells_a_cut_from_a_torn_tail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = sorted(folder.glob("*.seg"))[-1]
    with last.open("ab") as file:
        file.write(b"\xa5FRM torn")
    code, text = run(capsys, "journal", "verify", folder)
    assert code == 0 and "A torn tail of 9 bytes was never acknowledged" in text
    last.write_bytes(last.read_bytes()[:100])
    code, text = run(capsys, "journal", "verify", folder)
    assert code == 1 and "acknowledged records behind LSN" in text and "are missing" in text
    last.unlink()
    assert run(capsys, "journal", "verify", folder)[0] == 1
    (folder / "state").unlink()
    assert "The file `state` is missing" in run(capsys, "journal", "verify", folder)[1]


def test_a_cut_of_acknowledged_records_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    last = sorted(folder.glob("*.seg"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    Journal(folder, disk=QuietDisk()).close()
    assert "acknowledged records from LSN" in caplog.text and "are gone" in caplog.text
    caplog.clear()
    Journal(folder, disk=QuietDisk()).close()
    assert not caplog.text, "once"


def test_compact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = lines(capsys, "journal", "show", folder)
    code, text = run(capsys, "journal", "compact", folder)
    assert code == 0 and "segments compacted" in text and "1 requests are open" in text
    assert lines(capsys, "journal", "compact", folder) == [
        {"segments": [], "bytes_before": 0, "bytes_after": 0, "open_requests": [9]}
    ]
    assert lines(capsys, "journal", "show", folder) == before


def test_follow_shows_what_a_writer_adds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(folder, disk=QuietDisk()) as journal:
        journal.append(Event("LATE"))
        journal.commit()
        shown = lines(capsys, "journal", "show", folder, "--follow", "--kind", "LATE", "--limit", 1)
    assert [line["lsn"] for line in shown] == [63]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "journal", "show", tmp_path / "none")
    assert code == 2 and "is no folder, so it is no journal" in text
    code, text = run(capsys, "journal", "verify", tmp_path, "--since", 4)
    assert code == 2 and "belong to `journal show`" in text
    code, text = run(capsys, "journal", "verify", tmp_path)
    assert code == 0 and "0 records" in text


def test_the_canonical_form() -> None:
    assert canonical({"b": [1, 2.5, None, True], "a": "é\n"}) == '{"a":"é\\n","b":[1,2.5,null,true]}'
    assert canonical(1e-7) == "0.0000001" and canonical(1e22) == "10000000000000000000000"
    assert canonical({"x": b""}).startswith('{"x":{"sha256":"e3b0c442')
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    for wrong in (float("nan"), {1: 2}, {1, 2}, object()):
        with pytest.raises(JournalError, match="no canonical form"):
            canonical(wrong)


def test_the_key_of_a_call_depends_on_all_that_it_names() -> None:
    def key(**changed: Any) -> bytes:
        return call_key(
            **{"trajectory": "t", "branch": 0, "call_index": 1, "tool": "shell", "arguments": "ls", **changed}
        )

    assert key() == key() and len(key()) == 16
    changes: list[dict[str, Any]] = [
        {"trajectory": "u"},
        {"branch": 1},
        {"call_index": 2},
        {"tool": "python"},
        {"arguments": ["ls"]},
        {"stdin": b""},
        {"cwd": "/"},
        {"user": "root"},
        {"env": {"A": "1"}},
    ]
    assert len({key(), *(key(**change) for change in changes)}) == len(changes) + 1
    assert key(env={"A": "1", "B": "2"}) == key(env={"B": "2", "A": "1"})
