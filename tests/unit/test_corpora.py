"""Corpora: what is read, how it is split, and what every unreadable thing says about itself."""

import json
import os
from pathlib import Path

import pytest

from rorqual.data import Corpus, CorpusDocument, folder_corpus, open_corpus, python_corpus
from rorqual.data.tasks import CANARY
from rorqual.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def names(corpus: Corpus) -> list[str]:
    return [document.name for document in corpus.documents]


def test_python_corpus_reads_sources_by_their_own_rules(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "x = 1\n")
    write(tmp_path / "latin.py", b"# -*- coding: latin-1 -*-\ns = '\xe9'\n")
    write(tmp_path / "bad.py", b"s = '\xe9'\n")
    write(tmp_path / "same_as_a.py", "x = 1\n")
    write(tmp_path / "table.py", '""" Codec generated from X with gencodec.py.\n"""\n')
    write(tmp_path / "pkg/tests/t.py", "assert True\n")
    write(tmp_path / "site-packages/other.py", "y = 2\n")
    write(tmp_path / "notes.txt", "no")
    write(tmp_path / "empty.py", "")
    corpus = python_corpus(tmp_path)
    assert names(corpus) == ["a.py", "latin.py"]
    assert "é" in corpus.documents[1].text
    assert names(python_corpus(tmp_path, include_tests=True, include_generated=True)) == [
        "a.py",
        "latin.py",
        "pkg/tests/t.py",
        "table.py",
    ]
    with pytest.raises(DataError, match=r"No Python sources were found under .*Fix: use an interpreter"):
        python_corpus(tmp_path / "absent")


def test_default_corpus_splits_without_overlap() -> None:
    corpus = open_corpus("python")
    train, heldout = corpus.split()
    assert len(train) + len(heldout) == len(corpus) > 300
    assert 0.02 < len(heldout) / len(corpus) < 0.09
    assert not {d.text for d in train.documents} & {d.text for d in heldout.documents}
    assert sum(1 for _ in corpus.texts()) == len(corpus)


def test_split_is_stable_when_documents_come_and_go() -> None:
    documents = [CorpusDocument(f"f{i}.py", f"x = {i}") for i in range(400)]
    _, small = Corpus.build("c", documents[:200]).split(0.1)
    _, large = Corpus.build("c", reversed(documents)).split(0.1)
    assert set(names(small)) == set(names(large)) & {d.name for d in documents[:200]}
    # pinned: a change of the hash would leak held-out files into training between versions
    assert names(Corpus.build("c", documents[:40]).split(0.1)[1]) == PINNED
    assert len(Corpus.build("c", documents).split(0.0)[1]) == 0
    for share in (1.0, -0.1):
        with pytest.raises(DataError, match=f"held-out share is {share}"):
            large.split(share)


PINNED = ["f1.py", "f11.py", "f13.py", "f2.py", "f20.py", "f21.py"]


def test_equal_files_never_stand_on_both_sides() -> None:
    documents = [CorpusDocument(f"f{i}.py", f"x = {i % 7}") for i in range(100)]
    corpus = Corpus.build("c", documents)
    assert len(corpus) == 7


def test_folder_and_file(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\ufeffone")
    write(tmp_path / "b/c.md", "two")
    write(tmp_path / "b/.hidden/d.md", "no")
    write(tmp_path / "image.png", b"\0\1")
    write(tmp_path / "e.jsonl", '{"text": "three"}\n\n{"text": "four"}\n')
    corpus = open_corpus(tmp_path)
    assert names(corpus) == ["a.txt", "b/c.md", "e.jsonl#1", "e.jsonl#3"]
    assert list(corpus.texts()) == ["one", "two", "three", "four"]
    assert names(open_corpus(str(tmp_path / "a.txt"))) == ["a.txt"]


def test_long_text_becomes_sections_that_join_to_it(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} of some words\n\n" for i in range(8000))
    corpus = open_corpus(write(tmp_path / "book.txt", text))
    assert 4 < len(corpus) < 10
    ordered = sorted(corpus.documents, key=lambda d: int(d.name.split("#")[1]))
    assert "".join(d.text for d in ordered) == text
    assert all(d.text.endswith("\n\n") for d in ordered)


def test_conversations_train_the_assistant_only(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes", "reasoning_content": "again"},
    ]
    corpus = open_corpus(write(tmp_path / "chat.jsonl", json.dumps({"messages": messages})))
    (document,) = corpus.documents
    assert document.pieces is not None
    assert "".join(text for text, _ in document.pieces) == document.text
    learned = "".join(text for text, is_loss in document.pieces if is_loss)
    assert learned == "4<｜end▁of▁sentence｜>again</think>yes<｜end▁of▁sentence｜>"
    plain = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    (document,) = open_corpus(write(tmp_path / "plain.jsonl", json.dumps({"messages": plain}))).documents
    assert [text for text, is_loss in document.pieces or () if is_loss] == [
        "4<｜end▁of▁sentence｜>",
        "yes<｜end▁of▁sentence｜>",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"empty.txt is empty.*Fix: give a file with text"),
        ("x.txt", b"abc\0def", r"x.txt is a binary file \(a zero byte at offset 3\).*Fix: remove it"),
        ("x.txt", b"caf\xe9", r"x.txt is not UTF-8: byte 0xe9 at offset 3.*iconv"),
        ("x.jsonl", '{"text": "a"}\n{"text": ', r"x.jsonl, line 2 is not valid JSON.*Fix: repair or remove"),
        (
            "x.jsonl",
            json.dumps({"text": "a", "canary": CANARY}),
            r"line 1 is a test item.*Fix: remove that file",
        ),
        ("x.jsonl", '{"body": "a"}', r"line 1 has neither .*\(found: body\).*Fix: name the field `text`"),
        ("x.jsonl", "[1]", r"line 1 has neither .*\(found: list\)"),
        ("x.jsonl", '{"messages": []}', r"line 1 has neither .*\(found: messages\)"),
        (
            "x.jsonl",
            '{"messages": [{"role": "king", "content": "a"}]}',
            r"line 1: the messages cannot be rendered",
        ),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_corpus(write(tmp_path / name, content))


def test_unreadable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not exist.*Fix: give a text file"):
        open_corpus(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no text.*\.jsonl.*Fix: give another folder"):
        folder_corpus(tmp_path)
    write(tmp_path / "folder/x.txt", b"\xff")
    with pytest.raises(DataError, match=r"x.txt is not UTF-8"):
        open_corpus(tmp_path / "folder")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.txt cannot be read \(No such file"):
        open_corpus(tmp_path / "broken")


def test_folders_and_files_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "locked/b.txt", "two")
    real_scandir, real_stat = os.scandir, Path.stat

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for folder in (tmp_path, tmp_path / "locked"):
        with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\).*Fix: check its permissions"):
            open_corpus(folder)

    def stat(self: Path, **options: bool) -> os.stat_result:
        if self.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return real_stat(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(DataError, match=r"b.txt cannot be read \(Permission denied\)"):
        open_corpus(tmp_path / "locked/b.txt")


def test_records_are_read_whatever_the_suffix_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", '{"text": "one"}\n{"text": "two"}\n')
    write(tmp_path / "b.jsonl", '{"text": "three"}\n')
    assert list(open_corpus(path, is_jsonl=True).texts()) == ["one", "two"]
    assert list(open_corpus(tmp_path, is_jsonl=True).texts()) == ["three"]
