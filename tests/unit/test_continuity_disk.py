"""Reasoning kept on disk: by whom it is found again, what the file says, how much and how long."""

import threading
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import ConfigError
from rorqual.referee.continuity_disk import DiskContinuity


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(reasoning: str | None, content: str, *arguments: str) -> dict[str, Any]:
    made = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": one}}
            for i, one in enumerate(arguments)]  # fmt: skip
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": made}


def found(kept: DiskContinuity, text: str, owner: str = "me") -> Any:
    return kept.restore(owner, [user(text), answer(None, f"to {text}")]).messages[1]["reasoning_content"]


def keep(kept: DiskContinuity, text: str, reasoning: str, owner: str = "me") -> None:
    kept.remember(owner, [user(text)], answer(reasoning, f"to {text}"))


def test_another_process_finds_it_and_another_owner_does_not(tmp_path: Path) -> None:
    kept, other = DiskContinuity(tmp_path), DiskContinuity(tmp_path)
    keep(kept, "a", "Mine.")
    keep(other, "a", "Yours.", owner="you")
    assert found(other, "a") == "Mine." and found(kept, "a", "you") == "Yours." and found(kept, "a", "they") is None
    kept.remember("me", [user("b")], answer(None, "", '{"n":1.0}'), spelling=True)
    back = other.restore("me", [user("x"), answer("", "", '{"n": 1}')])
    assert back.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"n":1.0}'
    sampled = ((("n", "1", False),),)
    kept.remember("me", [user("c")], answer(None, "", '{"n": 2}'), sampled)
    call: Any = other.restore("me", [user("x"), answer("", "", '{"n": 2}')]).messages[1]["tool_calls"][0]
    assert call["sampled_parameters"] == sampled[0]
    kept.close()
    other.close()
    again = DiskContinuity(tmp_path)
    assert found(again, "a") == "Mine." and len(again) == 6
    again.close()


def test_the_file_says_nothing_and_what_was_changed_is_as_if_gone(tmp_path: Path) -> None:
    kept = DiskContinuity(tmp_path)
    keep(kept, "where is it?", "Below the kitchen floor.", owner="somebody")
    keep(kept, "b", "Other.")
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for text in (b"kitchen", b"where is it", b"somebody"):
        assert text not in stored
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())
    with kept._database.transaction() as rows:
        one, two = rows.execute("SELECT id, sealed FROM kept ORDER BY rowid").fetchall()
        rows.execute("UPDATE kept SET sealed = ? WHERE id = ?", (two["sealed"], one["id"]))
        spoilt = bytearray(two["sealed"])
        spoilt[20] ^= 1
        rows.execute("UPDATE kept SET sealed = ? WHERE id = ?", (bytes(spoilt), two["id"]))
    assert found(kept, "where is it?", "somebody") is None and found(kept, "b") is None
    keep(kept, "b", "Again.")
    kept.close()
    (tmp_path / "continuity.key").unlink()
    new = DiskContinuity(tmp_path)
    assert found(new, "b") is None, "another secret"
    new.close()


def test_it_is_bounded_in_size_and_age(tmp_path: Path) -> None:
    now = [1000.0]
    kept = DiskContinuity(tmp_path, max_bytes=20_000, expires_s=100, clock=lambda: now[0])
    for n in range(40):
        now[0] += 1
        keep(kept, f"q{n}", "x" * 1000)
        assert found(kept, "q0") is not None, "it is in use"
        assert kept.nbytes <= 20_000
    assert found(kept, "q39") is not None and found(kept, "q1") is None and 5 <= len(kept) <= 20
    keep(kept, "long", "y" * 30_000)
    assert found(kept, "long") is None and kept.nbytes <= 20_000
    keep(kept, "q", "z")
    now[0] += 101
    assert found(kept, "q") is None and len(kept) == 0 and kept.nbytes == 0
    kept.close()


def test_many_threads_and_stores_at_once(tmp_path: Path) -> None:
    def work(number: int) -> None:
        kept = DiskContinuity(tmp_path)
        for n in range(10):
            keep(kept, f"{number} {n}", f"thought {number} {n}")
            assert found(kept, f"{number} {n}") == f"thought {number} {n}"
        kept.close()

    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = DiskContinuity(tmp_path)
    assert not failed and len(kept) == 40
    kept.close()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="--continuity"):
        DiskContinuity(tmp_path / "file")
    (tmp_path / "continuity.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        DiskContinuity(tmp_path)
