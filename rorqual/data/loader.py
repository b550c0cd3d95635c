"""The endless, resumable stream of packed batches that training reads.

`state_dict()` taken after any batch and loaded into a new loader over the same sources gives the same
batches that would have followed, prefetching or not: the state belongs to the last batch handed out, not
to the last one made.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rorqual.data.packing import Batch, Packer, check_shape
from rorqual.data.sources import Source
from rorqual.errors import DataError

_VERSION = 1


class PackedLoader:
    """Packed batches from a weighted mixture of sources; deterministic for a seed.

    `weights`: share of tokens by source name (all equal when None; a missing name counts 0). `prefetch`:
    batches made ahead by a background thread; 0 makes each when asked. Raises: DataError for no sources,
    two of one name, unknown or unusable weights, or an impossible shape.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Mapping[str, float] | None = None,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        pad_token_id: int,
        prefetch: int = 0,
    ) -> None:
        names = [source.name for source in sources]
        if not names or len(set(names)) != len(names):
            raise DataError(
                f"The mixture has the sources {names}. Each needs a name of its own, and there must "
                "be at least one. "
                "Fix: pass `name=` where two sources come from one corpus."
            )
        check_shape(batch_size, seq_len)
        self._names = names
        self._sources = list(sources)
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._prefetch = prefetch
        self._packer = Packer(sources, self._shares(weights), seed, pad_token_id)
        self._num_batches = 0
        self._worker: _Worker | None = None
        self._handed_out = self._packer.state_dict()

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self._seq_len

    @property
    def batch_size(self) -> int:
        """Rows a batch."""
        return self._batch_size

    @property
    def num_batches(self) -> int:
        """Batches handed out so far, over all resumes."""
        return self._num_batches

    def _shares(self, weights: Mapping[str, float] | None) -> list[float]:
        if weights is None:
            return [1.0] * len(self._names)
        unknown = sorted(set(weights) - set(self._names))
        shares = [float(weights.get(name, 0.0)) for name in self._names]
        if unknown or not all(0 <= share < float("inf") for share in shares) or sum(shares) <= 0:
            raise DataError(
                f"The mixture weights {dict(weights)} do not fit the sources {self._names}. Each must "
                "name a source "
                "and be >= 0, and one must be above 0. Fix: correct the names or the numbers."
            )
        return shares

    # ------------------------------------------------------------- iterating

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._prefetch:
            if self._worker is None:
                self._worker = _Worker(self._packer, self._batch_size, self._seq_len, self._prefetch)
            batch, self._handed_out = self._worker.get()
        else:
            batch = self._packer.next_batch(self._batch_size, self._seq_len)
            self._handed_out = self._packer.state_dict()
        self._num_batches += 1
        return batch

    def _rewind(self) -> None:
        """Forget batches made ahead: continue from the last one handed out."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
            self._packer.load_state_dict(self._handed_out)

    def set_seq_len(self, seq_len: int) -> None:
        """Tokens a row from the next batch on."""
        if seq_len != self._seq_len:
            check_shape(self._batch_size, seq_len)
            self._rewind()
            self._seq_len = seq_len

    def set_batch_size(self, batch_size: int) -> None:
        """Rows a batch from the next batch on."""
        if batch_size != self._batch_size:
            check_shape(batch_size, self._seq_len)
            self._rewind()
            self._batch_size = batch_size

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """New shares from the next batch on; a call that changes nothing has no effect."""
        shares = self._shares(weights)
        if [share / sum(shares) for share in shares] != self._handed_out["weights"]:
            self._rewind()
            self._packer.set_weights(shares)
            self._handed_out = self._packer.state_dict()

    def close(self) -> None:
        """Stop the background thread, if any. The loader can be used again."""
        self._rewind()

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch handed out: small and JSON-serialisable.

        It carries shape and weights too, so a loaded stream continues as it was even if they had been
        changed.
        """
        return {
            "version": _VERSION,
            "seed": self._seed,
            "seq_len": self._seq_len,
            "batch_size": self._batch_size,
            "num_batches": self._num_batches,
            "sources": {source.name: source.fingerprint for source in self._sources},
            "packer": self._handed_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a stream. Raises DataError when it was taken over other data, seed or version."""
        here = {source.name: source.fingerprint for source in self._sources}
        for what, saved, now in (
            ("format version", state.get("version"), _VERSION),
            ("seed", state.get("seed"), self._seed),
            ("order of sources", list(state.get("sources", ())), self._names),
        ):
            if saved != now:
                raise DataError(
                    f"The saved data position has {what} {saved}, this run has {now}. The batches "
                    "would not continue "
                    "the same stream. Fix: resume with the recipe the run began with, or start a new run."
                )
        changed = [name for name in here if here[name] != state["sources"][name]]
        if changed:
            raise DataError(
                f"The data of {', '.join(changed)} changed since the position was saved (corpus, "
                "tokenizer or window "
                "options). The batches would not continue the same stream. Fix: restore them, or "
                "start a new run."
            )
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        self._seq_len = int(state["seq_len"])
        self._batch_size = int(state["batch_size"])
        self._num_batches = int(state["num_batches"])
        self._packer.load_state_dict(state["packer"])
        self._handed_out = self._packer.state_dict()


class _Worker:
    """A thread that makes batches ahead, each with the state that follows it."""

    def __init__(self, packer: Packer, batch_size: int, seq_len: int, depth: int) -> None:
        self._queue: queue.Queue[tuple[Batch, dict[str, Any]] | BaseException] = queue.Queue(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(packer, batch_size, seq_len), name="rorqual-data", daemon=True
        )
        self._thread.start()

    def _run(self, packer: Packer, batch_size: int, seq_len: int) -> None:
        item: tuple[Batch, dict[str, Any]] | BaseException
        while not self._stopping.is_set():
            try:
                item = (packer.next_batch(batch_size, seq_len), packer.state_dict())
            except BaseException as error:  # handed to the reader, who raises it
                item = error
            while not self._stopping.is_set():
                try:
                    self._queue.put(item, timeout=0.05)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def get(self) -> tuple[Batch, dict[str, Any]]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # a second ask gets the same answer, not a wait without end
            raise item
        return item

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
