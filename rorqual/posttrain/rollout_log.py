"""The write-ahead log of an engine's rollouts: every token as soon as it exists, with what it was drawn from.

    Request     a rollout begins: its id, seed, settings, and where its prompt lies
    Event       `prompt` (once for all that answer it), `mask` (ids that could be drawn, once a rollout), `experts` (of
                tokens that were read)
    Tokens      ids, float32 log probabilities, version of the weights, and the mask's digest
    KVReference a state that was saved in a file beside the journal
    Reward, Close   what it was worth, and how it ended

Tokens wait for a commit some milliseconds; those of a torn tail are drawn again, and are the same. What is light (ids,
lengths, rewards) is in memory for all rollouts, what is heavy (tokens, log probabilities, masks, experts) is read when
somebody asks for it, for a batch of rollouts in one pass.
Source: training specification, sections 13.1 and 13.2.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rorqual.errors import JournalError
from rorqual.journal import Close, Event, Journal, KVReference, Record, Request, Reward, Tokens

if TYPE_CHECKING:
    from rorqual.posttrain.rollouts import Rollout

GATHER_S = 0.02
"""Seconds that a token waits at most for others to share its sync."""


@dataclass
class Drawn:
    """What was drawn so far behind a prompt: lists of one entry a token, and experts of all tokens that were read."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    supports: list[NDArray[np.int32] | None] = field(default_factory=list)
    num_routed: int = 0
    _experts: list[NDArray[np.int16]] = field(default_factory=list)

    def add(
        self,
        token: int,
        logprob: float,
        version: int,
        support: NDArray[np.int32] | None = None,
        experts: NDArray[np.int16] | None = None,
    ) -> None:
        """A token, and the experts [n, L, A] of the next tokens that were read before it was drawn."""
        self.ids.append(token)
        self.logprobs.append(float(np.float32(logprob)))  # as the log keeps it
        self.versions.append(version)
        self.supports.append(support)
        if experts is not None:
            self.add_experts(experts)

    def add_experts(self, experts: NDArray[np.int16]) -> None:
        """Experts [n, L, A] of the next tokens that were read."""
        if len(experts):
            self._experts.append(experts)
            self.num_routed += len(experts)

    def since(self, tokens: int, routed: int) -> Drawn:
        """What came after so many tokens and so many rows of experts; while another thread adds more."""
        end = len(self.supports)  # which a token is added to last
        part = (self.ids[tokens:end], self.logprobs[tokens:end], self.versions[tokens:end], self.supports[tokens:end])
        out = Drawn(*part)
        rows = list(self._experts)
        if rows:
            out.add_experts(np.concatenate(rows)[routed:])
        return out

    def extend(self, other: Drawn) -> None:
        """Add what came after this."""
        self.ids += other.ids
        self.logprobs += other.logprobs
        self.versions += other.versions
        self.supports += other.supports
        self.add_experts(other.experts())

    def experts(self) -> NDArray[np.int16]:
        """Of all tokens that were read, int16 [n, L, A]."""
        if len(self._experts) > 1:
            self._experts = [np.concatenate(self._experts)]
        return self._experts[0] if self._experts else np.zeros((0, 0, 0), dtype=np.int16)


@dataclass(frozen=True)
class RolloutRow:
    """What is light of a rollout: enough to shuffle, to pack, and to choose what to load."""

    id: str
    number: int
    prompt_id: str
    index: int
    num_prompt: int
    num_drawn: int
    reward: float | None
    truncated: bool
    versions: tuple[int, int]
    """The oldest and the newest that drew a token of it."""


@dataclass
class _Entry:
    """A rollout in the log. masks: digests of those that are written."""

    request: Request
    first_lsn: int
    last_lsn: int
    num_prompt: int = 0
    num_drawn: int = 0
    versions: tuple[int, int] | None = None
    masks: set[bytes] = field(default_factory=set)
    saved: KVReference | None = None
    reward: float | None = None
    closed: Close | None = None
    drawn: Drawn | None = None
    """Of one that is not closed: it may go on."""


class RolloutLog:
    """The log in folder `path`, written by one process at a time; opening it finds what earlier ones wrote.

    gather_s: see GATHER_S. sync: False survives the process but not the machine. take_over: fence a writer that hangs.
    Raises: JournalError as `Journal`.
    """

    def __init__(
        self, path: str | Path, *, gather_s: float = GATHER_S, sync: bool = True, take_over: bool = False
    ) -> None:
        self.path, self._gather_s = Path(path), gather_s
        self.journal = Journal(self.path / "journal", sync=sync, take_over=take_over)
        self._states = self.path / "states"
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._numbers: dict[str, int] = {}
        self._prompts: dict[bytes, tuple[int, int]] = {}  # by digest: LSN and length
        for lsn, record in self.journal.replay():
            self._see(lsn, record)
        for entry in self._entries.values():
            if entry.closed is not None:
                entry.drawn = None

    # ----------------------------------------------------------------- writing

    def open(self, id: str, prompt: Sequence[int], seed: int, sampling: dict[str, Any]) -> tuple[int, Drawn]:
        """Begin a rollout, or go on with it: its number here and what was drawn of it.

        Raises: JournalError when the log has it with another prompt, seed or settings.
        """
        digest = _digest(prompt)
        with self._lock:
            number = self._numbers.get(id)
            if number is not None:
                entry = self._entries[number]
                asked = (digest, seed.to_bytes(16, "little"), sampling)
                if asked != (entry.request.prompt_digest, entry.request.seed_key, entry.request.sampling):
                    raise JournalError(
                        f"the log {self.path} has the rollout {id} with another prompt, seed or sampling, so its rest "
                        "would not belong to it. Give new prompts ids of their own, or use a new folder."
                    )
                if entry.drawn is not None:
                    return number, entry.drawn
            else:
                return self._begin(id, prompt, digest, seed, sampling)
        return number, self._read([self._entries[number]])[0]

    def _begin(
        self, id: str, prompt: Sequence[int], digest: bytes, seed: int, sampling: dict[str, Any]
    ) -> tuple[int, Drawn]:
        if digest not in self._prompts:
            packed = np.asarray(prompt, dtype="<u4").tobytes()
            self._write(Event("prompt", {"digest": digest, "ids": packed}))
        number = 1 + max(self._entries, default=0)
        request = Request(
            id, number, prompt_digest=digest, prompt_ref=f"prompt {digest.hex()}", sampling=sampling,
            seed_key=seed.to_bytes(16, "little"),
        )  # fmt: skip
        self._write(request)
        drawn = self._entries[number].drawn
        assert drawn is not None
        return number, drawn

    def _write(self, record: Record) -> None:
        """Append a record and account for it; durable with the next commit."""
        self._see(self.journal.append(record), record, is_new=True)

    def token(
        self,
        number: int,
        drawn: Drawn,
        token: int,
        logprob: float,
        version: int,
        support: NDArray[np.int32] | None = None,
        experts: NDArray[np.int16] | None = None,
    ) -> None:
        """Log a token that is about to be added to `drawn`, behind what it needs. Raises: JournalError."""
        with self._lock:
            entry = self._entries[number]
            if experts is not None and len(experts):
                data = experts.astype("<i2").tobytes()
                fields = {"request": number, "first": drawn.num_routed, "shape": list(experts.shape), "data": data}
                self.journal.append(Event("experts", fields))
            mask = None if support is None else self._mask(entry, number, support)
            position = entry.num_prompt + len(drawn.ids)
            if mask is None:
                entry.last_lsn = self.journal.append_token(number, position, version, token, logprob)
            else:
                entry.last_lsn = self.journal.append(Tokens(number, position, version, (token,), (logprob,), mask))
            _count(entry, 1, version)
        self.journal.commit_soon(within_s=self._gather_s)

    def adopt(self, number: int, drawn: Drawn) -> None:
        """Take over tokens that were drawn elsewhere, where this log has fewer of them; durable on return."""
        with self._lock:
            own = self._entries[number].drawn
        if own is None:
            return
        experts = drawn.experts()[own.num_routed :]
        for at in range(len(own.ids), len(drawn.ids)):
            what = (drawn.ids[at], drawn.logprobs[at], drawn.versions[at], drawn.supports[at], experts)
            self.token(number, own, *what)
            own.add(*what)
            experts = experts[:0]
        self.commit()

    def _mask(self, entry: _Entry, number: int, support: NDArray[np.int32]) -> bytes:
        digest = hashlib.blake2b(support.tobytes(), digest_size=16).digest()
        if digest not in entry.masks:
            self.journal.append(Event("mask", {"request": number, "digest": digest, **pack_support(support)}))
            entry.masks.add(digest)
        return digest

    def save_state(self, number: int, saved: bytes, drawn: Drawn, version: int) -> None:
        """Keep the state of a rollout that is paused; durable once committed."""
        self._states.mkdir(parents=True, exist_ok=True)
        partial = self._states / f"{number}.part"
        partial.write_bytes(saved)
        partial.replace(self._states / f"{number}.state")
        with self._lock:
            end = self._entries[number].num_prompt + len(drawn.ids)
            digest = hashlib.sha256(saved).hexdigest()
            self._write(KVReference(number, 0, end, digest, policy_version=version))

    def close_rollout(self, number: int, prompt_id: str, index: int, ending: str, reward: float | None) -> None:
        """A rollout is whole; nothing happens when the log says so already. Durable once committed."""
        with self._lock:
            entry = self._entries[number]
            if reward is not None and entry.reward is None:
                self._write(Reward(number, {"reward": float(reward)}))
            if entry.closed is None:
                self._write(Close(number, ending, {"prompt": prompt_id, "index": index, "tokens": entry.num_drawn}))
            entry.drawn = None
        (self._states / f"{number}.state").unlink(missing_ok=True)

    def commit(self) -> None:
        """Return once all is durable. Raises: JournalError."""
        self.journal.commit()

    def close(self) -> None:
        """Commit and let others write."""
        self.journal.close()

    def __enter__(self) -> RolloutLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------- reading

    def ending(self, number: int) -> str | None:
        """How a rollout ended; None while it has not."""
        closed = self._entries[number].closed
        return None if closed is None else closed.stop_reason

    def reward(self, number: int) -> float | None:
        """What it was worth, where that is on record."""
        return self._entries[number].reward

    def saved_state(self, number: int) -> tuple[bytes, int] | None:
        """The saved state of a rollout and the version of its weights; None where there is none, or a damaged one."""
        entry = self._entries[number]
        path = self._states / f"{number}.state"
        if (
            entry.saved is None
            or entry.closed is not None
            or entry.num_prompt + entry.num_drawn < entry.saved.end_position
        ):
            return None
        try:
            saved = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(saved).hexdigest() != entry.saved.digest:
            return None
        return saved, entry.saved.policy_version

    def rows(self) -> list[RolloutRow]:
        """The rollouts that are whole, in the order in which they were begun."""
        with self._lock:
            return [_row(number, entry) for number, entry in self._entries.items() if entry.closed is not None]

    def load(self, rows: Sequence[RolloutRow], names: Sequence[str] = (), *, keep_masks: bool = False) -> list[Rollout]:
        """All of these rollouts, read in one pass over the part of the journal where they lie.

        names: of the learned routers (`rollouts.router_names`), where experts were kept. Raises: JournalError.
        """
        from rorqual.posttrain.rollouts import rollout_of

        self.commit()
        entries = [self._entries[row.number] for row in rows]
        prompts = {digest: self._prompt(digest) for digest in {entry.request.prompt_digest for entry in entries}}
        out = []
        for row, entry, drawn in zip(rows, entries, self._read(entries), strict=True):
            rollout = rollout_of(prompts[entry.request.prompt_digest], drawn, names, keep_masks=keep_masks)
            rollout.prompt_id, rollout.index = row.prompt_id, row.index
            rollout.reward, rollout.truncated = row.reward, row.truncated
            out.append(rollout)
        return out

    def _prompt(self, digest: bytes) -> list[int]:
        lsn, _ = self._prompts[digest]
        _, record = next(self.journal.replay(since=lsn - 1))
        assert isinstance(record, Event)
        return np.frombuffer(record.fields["ids"], dtype="<u4").tolist()

    def _read(self, entries: Sequence[_Entry]) -> list[Drawn]:
        """What was drawn of these rollouts, from the journal."""
        found = {entry.request.request: (Drawn(), dict[bytes, NDArray[np.int32]]()) for entry in entries}
        first = min((entry.first_lsn for entry in entries), default=1)
        last = max((entry.last_lsn for entry in entries), default=0)
        for record in self._between(first, last):
            number = record.fields.get("request") if isinstance(record, Event) else getattr(record, "request", None)
            if number in found:
                _add(*found[number], record)
        return [found[entry.request.request][0] for entry in entries]

    def _between(self, first: int, last: int) -> Iterator[Record]:
        self.commit()
        for lsn, record in self.journal.replay(since=first - 1):
            if lsn > last:
                return
            yield record

    def _see(self, lsn: int, record: Record, *, is_new: bool = False) -> None:
        """Account for a record. Those of tokens come here when the log is opened; new ones are counted as written."""
        if isinstance(record, Event) and record.kind == "prompt":
            self._prompts[record.fields["digest"]] = lsn, len(record.fields["ids"]) // 4
            return
        if isinstance(record, Request):
            entry = self._entries[record.request] = _Entry(record, lsn, lsn, self._prompts[record.prompt_digest][1])
            entry.drawn = Drawn()
            self._numbers[record.trajectory] = record.request
            return
        number = record.fields.get("request") if isinstance(record, Event) else getattr(record, "request", None)
        found = self._entries.get(number) if isinstance(number, int) else None
        if found is None:
            return
        found.last_lsn = lsn
        if isinstance(record, Reward):
            found.reward = record.values["reward"]
        elif isinstance(record, Close):
            found.closed = record
        elif isinstance(record, KVReference):
            found.saved = record
        elif not is_new and found.drawn is not None:
            self._replay(found, record)

    def _replay(self, entry: _Entry, record: Record) -> None:
        assert entry.drawn is not None
        masks: dict[bytes, NDArray[np.int32]] = entry.__dict__.setdefault("_mask_ids", {})
        _add(entry.drawn, masks, record)
        entry.masks |= masks.keys()
        if isinstance(record, Tokens):
            _count(entry, len(record.ids), record.policy_version)


def _count(entry: _Entry, tokens: int, version: int) -> None:
    entry.num_drawn += tokens
    if entry.versions is None:
        entry.versions = version, version
    elif version != entry.versions[1]:
        entry.versions = min(version, entry.versions[0]), max(version, entry.versions[1])


def _row(number: int, entry: _Entry) -> RolloutRow:
    assert entry.closed is not None
    totals = entry.closed.totals
    return RolloutRow(
        entry.request.trajectory, number, totals["prompt"], totals["index"], entry.num_prompt, entry.num_drawn,
        entry.reward, entry.closed.stop_reason == "length", entry.versions or (0, 0),
    )  # fmt: skip


def _add(drawn: Drawn, masks: dict[bytes, NDArray[np.int32]], record: Record) -> None:
    """Put a record of a rollout where it belongs."""
    if isinstance(record, Tokens):
        assert record.logprobs is not None
        support = None if record.mask is None else masks[record.mask]
        for token, logprob in zip(record.ids, record.logprobs, strict=True):
            drawn.add(token, logprob, record.policy_version, support)
    elif isinstance(record, Event) and record.kind == "mask":
        masks[record.fields["digest"]] = unpack_support(record.fields)
    elif isinstance(record, Event) and record.kind == "experts":
        rows = np.frombuffer(record.fields["data"], dtype="<i2").reshape(record.fields["shape"]).astype(np.int16)
        drawn.add_experts(rows[max(0, drawn.num_routed - record.fields["first"]) :])


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(array("I", ids).tobytes()).digest()


def pack_support(support: NDArray[np.int32]) -> dict[str, Any]:
    """Ids, or a bit for each id, whichever is shorter."""
    width = int(support[-1]) + 1
    if 32 * len(support) <= width:
        return {"ids": support.astype("<i4").tobytes()}
    bits = np.zeros(width, dtype=bool)
    bits[support] = True
    return {"bits": np.packbits(bits).tobytes()}


def unpack_support(fields: Mapping[str, Any]) -> NDArray[np.int32]:
    if "ids" in fields:
        return np.frombuffer(fields["ids"], dtype="<i4").astype(np.int32)
    return np.unpackbits(np.frombuffer(fields["bits"], dtype=np.uint8)).nonzero()[0].astype(np.int32)
