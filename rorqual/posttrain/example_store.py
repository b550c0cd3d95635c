"""Examples on disk, made once and read at random: a data set may be larger than memory, and every epoch has its order.

Three files: `ids.bin` (int32), `learned.bin` (a byte an id) and `index.json`, which is written last, so a folder that
has one is whole. It says what the examples were made from; made again from the same, they are the same.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rorqual.errors import DataError
from rorqual.posttrain.examples import Example

_INDEX = "index.json"


class ExampleStore:
    """The examples of a folder, by number."""

    def __init__(self, folder: Path) -> None:
        """Open what `build` wrote. Raises: DataError when it is not whole."""
        self.folder = folder
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.lengths: npt.NDArray[np.int64] = np.array(index["lengths"], dtype=np.int64)
            self.facts: dict[str, Any] = index["facts"]
            count = int(self.lengths.sum())
            self._ids = np.memmap(folder / "ids.bin", np.int32, "r", shape=(count,)) if count else np.zeros(0, np.int32)
            self._learned = (
                np.memmap(folder / "learned.bin", np.bool_, "r", shape=(count,)) if count else np.zeros(0, np.bool_)
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} does not hold whole examples ({error}). Remove it; they are made again from the data."
            ) from error
        self._stops = np.cumsum(self.lengths)

    @classmethod
    def build(cls, folder: Path, examples: Iterable[Example], facts: dict[str, Any]) -> "ExampleStore":
        """Write examples as they come; `facts` (JSON) are kept beside them and may still grow while they do."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _INDEX).unlink(missing_ok=True)
        lengths = []
        with (folder / "ids.bin").open("wb") as ids, (folder / "learned.bin").open("wb") as learned:
            for example in examples:
                lengths.append(len(example))
                ids.write(np.array(example.ids, dtype=np.int32).tobytes())
                learned.write(np.array(example.loss_mask, dtype=np.bool_).tobytes())
        draft = folder / "index.draft"
        draft.write_text(json.dumps({"facts": facts, "lengths": lengths}), encoding="utf-8")
        draft.replace(folder / _INDEX)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Ids and loss mask of one example."""
        stop = int(self._stops[number])
        start = stop - int(self.lengths[number])
        return np.asarray(self._ids[start:stop], dtype=np.int64), np.asarray(self._learned[start:stop])
