"""The data of supervised fine-tuning: from the sources of a recipe to examples on disk, learned and held out."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rorqual import log
from rorqual.data import encode_pieces
from rorqual.data import tasks as task_room
from rorqual.errors import ConfigError, DataError
from rorqual.posttrain.config import Section
from rorqual.posttrain.conversations import Conversation, PlainText, ReadReport, note_fault, read_rows, read_samples
from rorqual.posttrain.example_store import ExampleStore
from rorqual.posttrain.examples import Example
from rorqual.posttrain.masking import examples_of
from rorqual.posttrain.packing import FitReport, TooLong, fit
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer

logger = log.get(__name__)


class DataSource(Section):
    """Where examples come from: a file or folder of rows, or a synthetic task family."""

    path: str | None = Field(
        default=None, description="A .jsonl, .json or .parquet file, or a folder (of those, or a saved data set)."
    )
    family: str | None = Field(default=None, description="A task family instead, such as arith or tool.")
    count: int | None = Field(default=None, ge=1, description="Most rows to take; a family needs it.")
    repeat: int = Field(default=1, ge=1, description="How often each row is learned in an epoch.")
    world: str = Field(default=task_room.DEFAULT_WORLD, description="Id of the world that a family asks about.")
    world_size: task_room.WorldSize = Field(default="tiny", description="How many people it has.")
    model_name: str = Field(default="Minke", description="What the family chat teaches the model to call itself.")

    @model_validator(mode="after")
    def _is_one(self) -> "DataSource":
        if (self.path is None) == (self.family is None):
            raise ValueError("a source has a path or a family, one of the two")
        if self.family is not None and self.count is None:
            raise ValueError(f"the family {self.family!r} never ends; say the count of examples to take")
        return self


def prepare(
    folder: Path,
    sources: Iterable[DataSource],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    too_long: TooLong,
    skip_bad: bool,
    revision: str,
    seed: int,
) -> ExampleStore:
    """The examples of all sources in `folder`, made unless they are there from the same sources already.

    Its `facts` say what was read, left out and cut. Raises: DataError for rows that cannot be used, and when nothing
    is left; ConfigError for a family that does not exist.
    """
    sources = list(sources)
    origin = _origin(sources, tokenizer, seq_len, too_long, skip_bad, revision, seed)
    if (folder / "index.json").is_file():
        store = ExampleStore(folder)
        if store.facts.get("origin") == origin:
            return store
    reading, fitting = ReadReport(), FitReport()
    facts: dict[str, Any] = {"origin": origin, "seq_len": seq_len}

    def examples() -> Iterator[Example]:
        for source in sources:
            found = _from_path(source, tokenizer, revision, skip_bad, reading) if source.path else _from_family(
                source, tokenizer, seed
            )  # fmt: skip
            for example in fit(found, seq_len, too_long, fitting):
                yield from [example] * source.repeat
        facts.update(read=asdict(reading), fit=fitting.to_dict())

    store = ExampleStore.build(folder, examples(), facts)
    _report(store.facts)
    if not len(store):
        raise DataError(
            f"Of {reading.rows} rows nothing is left to learn: {fitting.dropped} examples were longer than seq_len = "
            f"{seq_len}, {reading.skipped} rows could not be used. Raise seq_len, or look at the rows."
        )
    return store


def split(store: ExampleStore, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the examples that are learned and that are held out, by equal contents on one side.

    Raises: DataError when one of the sides is empty.
    """
    if not share:
        return list(range(len(store))), []
    sides: tuple[list[int], list[int]] = ([], [])
    for number in range(len(store)):
        digest = hashlib.blake2b(store.read(number)[0].tobytes(), digest_size=8, key=seed.to_bytes(8, "little"))
        sides[int.from_bytes(digest.digest(), "big") < share * 2**64].append(number)
    if not all(sides):
        raise DataError(
            f"Of {len(store)} examples {len(sides[1])} fell to the validation share of {share}, so one side is empty. "
            "Give more data, another share, or validation data of its own."
        )
    return sides


def _from_path(
    source: DataSource, tokenizer: Tokenizer, revision: str, skip_bad: bool, report: ReadReport
) -> Iterator[Example]:
    assert source.path is not None
    rows = islice(read_rows(source.path), source.count)
    for sample in read_samples(rows, revision=revision, skip_bad=skip_bad, report=report):
        yield from _examples(sample, tokenizer, revision, skip_bad, report)


def _examples(
    sample: Conversation | PlainText, tokenizer: Tokenizer, revision: str, skip_bad: bool, report: ReadReport
) -> list[Example]:
    try:
        return examples_of(sample, tokenizer, revision)
    except DataError as error:
        note_fault(report, error, skip_bad)
        return []


def _from_family(source: DataSource, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
    """Training documents of a family; its test items are of another split."""
    assert source.family is not None and source.count is not None
    known = task_room.named_families(source.world, size=source.world_size, model_name=source.model_name)
    if source.family not in known:
        raise ConfigError(
            f"There is no task family {source.family!r}, so nothing can be made for it. Choose from "
            f"{', '.join(sorted(known))}."
        )
    family = known[source.family]
    for index in range(source.count):
        pieces = family.document_at(random.Random(derive(seed, "sft-family", source.family, index)), index)
        ids, mask = encode_pieces(tokenizer, list(pieces))
        if ids[-1] != tokenizer.eos_token_id:
            raise DataError(f"A document of the family {source.family!r} does not end with the end token.")
        yield Example(ids.tolist(), mask.tolist(), f"{source.family}:{index}")


def _origin(sources: list[DataSource], tokenizer: Tokenizer, *settings: Any) -> str:
    """A hash of what the examples are made from: settings, tokenizer, and names and contents of the files."""
    files = []
    for source in sources:
        if source.path is None:
            continue
        path = Path(source.path).expanduser()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as content:
                    files.append([file.name, hashlib.file_digest(content, "sha256").hexdigest()])
    what = [[source.model_dump(exclude={"path"}) for source in sources], tokenizer.fingerprint, list(settings), files]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _report(facts: dict[str, Any]) -> None:
    read, fitted = facts["read"], facts["fit"]
    if read["skipped"]:
        logger.warning(
            "%d of %d rows could not be used and were left out. The first: %s",
            read["skipped"], read["rows"], read["faults"][0],
        )  # fmt: skip
    if fitted["dropped"] or fitted["trimmed"]:
        logger.warning(
            "%d examples are longer than seq_len = %d and were left out; %d were cut behind their last whole answer, "
            "which lost %d answers.",
            fitted["dropped"], facts["seq_len"], fitted["trimmed"], fitted["lost_answers"],
        )  # fmt: skip
