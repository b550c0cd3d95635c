"""Where training text comes from: Python's own sources, text files, folders, and JSONL.

A corpus is a list of named documents in memory, without duplicates, in the order of their names. Its
split into train and held-out hashes each name, so a document stays on its side when others come or go.
"""

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rorqual import log
from rorqual.data.conversations import render_conversation
from rorqual.data.tasks import CANARY
from rorqual.errors import DataError, RorqualError

_SUFFIXES = (
    ".txt .md .rst .tex .csv .toml .yaml .yml .html .css .sql .sh .py .pyi .c .h .cc .cpp .hpp .js .ts .rs .go .java"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
_JSONL = frozenset({".jsonl"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_SECTION_CHARS = 32_768
_logger = log.get(__name__)


@dataclass(frozen=True)
class CorpusDocument:
    """One document: name within the corpus, text, and for chat that text in pieces `(text, is_loss)`."""

    name: str
    text: str
    pieces: tuple[tuple[str, bool], ...] | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the text (equal texts are duplicates, whatever their names)."""
        return hashlib.blake2b(self.text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Documents under one name."""

    name: str
    documents: tuple[CorpusDocument, ...]

    @classmethod
    def build(cls, name: str, documents: Iterable[CorpusDocument]) -> "Corpus":
        """Sort by name, drop empty documents and all but the first of equal ones."""
        first: dict[str, CorpusDocument] = {}
        for document in sorted(documents, key=lambda d: d.name):
            if document.text:
                first.setdefault(document.digest, document)
        return cls(name, tuple(first.values()))

    def split(self, heldout: float = 0.05) -> tuple["Corpus", "Corpus"]:
        """(train, held-out), divided by a hash of the name; no text is on both sides."""
        if not 0 <= heldout < 1:
            raise DataError(
                f"The held-out share is {heldout}. It must leave something to train on. Fix: 0 <= share < 1, e.g. 0.05."
            )
        sides: tuple[list[CorpusDocument], list[CorpusDocument]] = ([], [])
        for document in self.documents:
            digest = hashlib.blake2b(document.name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            sides[int.from_bytes(digest, "big") < heldout * 2**64].append(document)
        return Corpus(self.name, tuple(sides[0])), Corpus(f"{self.name}-heldout", tuple(sides[1]))

    def texts(self) -> Iterator[str]:
        """All texts, for training a tokenizer."""
        return (document.text for document in self.documents)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(len(d.text.encode("utf-8", "replace")) for d in self.documents)

    def __len__(self) -> int:
        return len(self.documents)


def open_corpus(spec: str | os.PathLike[str], *, is_jsonl: bool = False) -> Corpus:
    """`"python"`, or a path to a text file, a folder, or a `.jsonl` file.

    `is_jsonl`: the file holds a JSON record a line whatever its suffix, and of a folder only `.jsonl` files are read.
    Raises: DataError when it is absent, unreadable, damaged or empty.
    """
    if spec == "python" and not is_jsonl:
        return python_corpus()
    path = Path(spec).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"The corpus {path} does not exist. There is nothing to train on. "
            'Fix: give a text file, a folder of text files, a .jsonl file, or the word "python".'
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if path.is_dir():
        return folder_corpus(path, suffixes=_JSONL if is_jsonl else None)
    is_jsonl = is_jsonl or path.suffix.lower() in _JSONL
    documents = _jsonl_documents(path, path.name) if is_jsonl else _sections(path.name, _read(path))
    corpus = Corpus.build(path.stem, documents)
    if not corpus.documents:
        raise DataError(f"{path} is empty. There is nothing to train on. Fix: give a file with text in it.")
    return corpus


def python_corpus(
    folder: str | os.PathLike[str] | None = None,
    *,
    include_tests: bool = False,
    include_generated: bool = False,
) -> Corpus:
    """Sources of the running interpreter's standard library (or of `folder`), without installed packages.

    Left out by default: test folders, and tables written by a program (character maps, keyword topics),
    which are bytes without code in them. Files that do not decode by their own coding line are skipped:
    the test folder has some on purpose.
    """
    root = Path(folder if folder is not None else sysconfig.get_path("stdlib"))
    documents = []
    skipped = 0
    unreadable: list[OSError] = []
    for path in _walk(root, _NOT_STDLIB if include_tests else _NOT_STDLIB | _TEST_FOLDERS, unreadable.append):
        if path.suffix != ".py":
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            skipped += 1
            continue
        if include_generated or not _is_generated(text):
            documents.append(CorpusDocument(path.relative_to(root).as_posix(), text))
    if skipped:
        _logger.info("python corpus: %d undecodable files skipped", skipped)
    for error in unreadable:
        _logger.warning("python corpus: the folder %s was skipped (%s)", error.filename, error.strerror)
    corpus = Corpus.build("python", documents)
    if not corpus.documents:
        raise DataError(
            f"No Python sources were found under {root}. The default corpus is made of them. "
            "Fix: use an interpreter that ships its standard library as .py files, or give a corpus path."
        )
    return corpus


def folder_corpus(folder: str | os.PathLike[str], *, suffixes: frozenset[str] | None = None) -> Corpus:
    """All text files (by suffix) and `.jsonl` files below `folder`; hidden files and folders are left out.

    Raises: DataError for a file or folder that cannot be read, and when there is no text.
    """
    root = Path(folder)
    documents: list[CorpusDocument] = []
    suffixes = TEXT_SUFFIXES | _JSONL if suffixes is None else suffixes

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename or root), error) from None

    for path in _walk(root, on_error=refuse):
        name = path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if suffix in suffixes:
            documents += _jsonl_documents(path, name) if suffix in _JSONL else _sections(name, _read(path))
    corpus = Corpus.build(root.name or "folder", documents)
    if not corpus.documents:
        raise DataError(
            f"The folder {root} holds no text. Only files with these suffixes are read: "
            f"{' '.join(sorted(suffixes))}. Fix: give another folder, or rename the files."
        )
    return corpus


def _walk(
    root: Path, skipped: frozenset[str] = frozenset(), on_error: Callable[[OSError], object] | None = None
) -> Iterator[Path]:
    """Files below `root` in a stable order, without hidden ones and without folders named in `skipped`.

    `on_error` is told of each folder that cannot be listed.
    """
    for folder, folders, files in os.walk(root, onerror=on_error):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def _is_generated(text: str) -> bool:
    head = text[:600].lower()
    return any(sign in head for sign in ("gencodec.py", "autogenerated", "auto-generated", "automatically generated"))


def _read(path: Path) -> str:
    """The text of a UTF-8 file, or a DataError that says what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if b"\0" in content:
        raise DataError(
            f"{path} is a binary file (a zero byte at offset {content.index(0)}). Training needs text. "
            "Fix: remove it from the corpus, or convert it to UTF-8 text."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}. "
            "Guessing another "
            "encoding would corrupt the text. Fix: convert it, e.g. `iconv -f latin1 -t utf-8`, or remove it."
        ) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read ({error.strerror or error}). Its text is part of the corpus. Fix: check its "
        "permissions, or take it out of the corpus."
    )


def _sections(name: str, text: str) -> list[CorpusDocument]:
    """A long text as sections of about 32 K characters cut at blank lines, so one file still shuffles."""
    sections = []
    start = 0
    while len(text) - start > _SECTION_CHARS * 3 // 2:
        cut = text.find("\n\n", start + _SECTION_CHARS, start + 2 * _SECTION_CHARS)
        cut = cut + 2 if cut >= 0 else text.find("\n", start + _SECTION_CHARS) + 1
        if cut <= 0:
            break
        sections.append(text[start:cut])
        start = cut
    sections.append(text[start:])
    if len(sections) == 1:
        return [CorpusDocument(name, text)]
    return [CorpusDocument(f"{name}#{i}", section) for i, section in enumerate(sections)]


def _jsonl_documents(path: Path, name: str) -> list[CorpusDocument]:
    """One document a line: `{"text": ...}` or `{"messages": [...], "tools": [...]}`; blank lines pass."""
    documents = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{place} is not valid JSON: {error}. Each line must be one JSON object. "
                "Fix: repair or remove that line."
            ) from None
        if CANARY in line:
            raise DataError(
                f"{place} is a test item of a Rorqual task family (it carries their canary string). "
                "A model trained on it could no longer be measured. Fix: remove that file from the corpus."
            )
        label = f"{name}#{number}"
        text = record.get("text") if isinstance(record, dict) else None
        messages = record.get("messages") if isinstance(record, dict) else None
        if isinstance(text, str):
            documents.append(CorpusDocument(label, text))
        elif isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            try:
                pieces = render_conversation(messages, record.get("tools"))
            except (RorqualError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{place}: the messages cannot be rendered ({error}). A conversation must be a "
                    "valid V4 chat. "
                    "Fix: check roles and fields of that line."
                ) from None
            documents.append(CorpusDocument(label, "".join(piece for piece, _ in pieces), pieces))
        else:
            fields = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{place} has neither a string field `text` nor a list `messages` (found: "
                f"{fields or 'nothing'}). "
                "There is nothing to train on in it. Fix: name the field `text`, or give chat `messages`."
            )
    return documents
