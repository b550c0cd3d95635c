"""Kill -9 during writes of the disk cache, and damage of every kind: is a wrong token ever served?

    python benchmarks/kill_disk_cache.py --json [--quick]

An engine with a disk cache serves requests in a process of its own, which is killed at a random moment, 200 times over
the same folder. After each kill another engine opens the folder and serves prompts that the dead one was busy with. The
tokens of both, as far as they came, are compared with those of the plain model, which has no cache. The network is
random and its likeliest two tokens differ in the sixth digit (`rorqual.engine.selftest.subject`), so that state that is
not the right one soon gives another token. Pages have 8 tokens and segments 128 KiB, so that records, indexes, ends of
segments and deletions are all being written when the signal comes; every other process writes in pieces of 700 bytes
with pauses between them, as a slow disk might. Conversations that come back as text use the file of sampled turns.

* `kill_disk_cache.kills`: wrong tokens in all, and what was seen: records that the kill had torn (each said once in the
  log), tokens that the restarts read from disk.
* `kill_disk_cache.damage`: the same after damage done on purpose to copies of a sound folder: flipped bits, cut ends,
  zeroed blocks, files emptied, exchanged, doubled, with garbage behind them; every kind of file (pages, checkpoints,
  their indexes, sampled turns).
* The peer of both is a control in which checksums are believed unseen and bits of pages are flipped: it must give wrong
  tokens, else the comparison would prove nothing. Exit code 1 for a wrong token of ours, or none of the control's.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # no pool of threads that a forked process would miss

import measure
import torch

from rorqual.engine import Engine, Request, SamplingParams, sampler
from rorqual.engine.prefix_cache import PrefixCache
from rorqual.engine.selftest.subject import high_entropy, small_config
from rorqual.engine.store import disk
from rorqual.model import Transformer
from rorqual.tokenizer import Tokenizer, train_tokenizer

NEW, PAGE, TEXTS = 16, 8, 6
LETTERS = b"the cats"


@dataclass
class World:
    """The model, the texts that are asked for, and the truth about them."""

    model: Transformer
    tokenizer: Tokenizer
    truths: dict[tuple[tuple[int, ...], bool], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        letters = {bytes([letter]) for letter in LETTERS}
        self.spelled = tuple(
            i for i in range(self.tokenizer.vocab_size) if self.tokenizer.token_bytes(i) not in letters
        )

    def prompt(self, draw: random.Random, family: int) -> list[int]:
        """A text of a family: its beginning is shared."""
        own = random.Random(family)
        stem = [own.randrange(3, 250) for _ in range(90)]
        return stem[: draw.choice([20, 45, 64, 90])] + [3 + family % 200] * draw.randrange(1, 4)

    def params(self, is_turn: bool) -> SamplingParams:
        """Greedy; a turn is spelled letter by letter, as the tokenizer would not."""
        return SamplingParams(temperature=0, max_tokens=NEW, suppress_token_ids=self.spelled if is_turn else ())

    def truth(self, prompt: tuple[int, ...], is_turn: bool) -> list[int]:
        """What the plain model says."""
        key = prompt, is_turn
        if key not in self.truths:
            state, new, out, own = self.model.new_state(), list(prompt), [], self.params(is_turn)
            with torch.inference_mode():
                while len(out) < NEW and self.tokenizer.eos_token_id not in out:
                    logits = self.model(torch.tensor([new]), state=state)[0, -1]
                    new = [sampler.sample(logits, own, 0, len(prompt) + len(out))]
                    out += new
            self.truths[key] = out
        return self.truths[key]

    def cache(self, folder: Path) -> PrefixCache:
        """Opened on a folder; small, so that everything goes to disk and comes from there."""
        return PrefixCache(
            self.model, folder=folder, memory_bytes=100_000, running_tokens=1024, page_tokens=PAGE, windows="full",
            disk_bytes=2 << 20, tokenizer=self.tokenizer,
        )  # fmt: skip


@dataclass
class Tally:
    """What was seen."""

    requests: int = 0
    tokens: int = 0
    wrong_tokens: int = 0
    disk_tokens: int = 0
    discarded: int = 0
    replaced_turns: int = 0
    failed: int = 0
    logged: Counter[str] = field(default_factory=Counter)
    said: set[str] = field(default_factory=set)
    """The different lines of the log: what stays torn is said again by each process that opens it."""
    first_wrong: str = ""

    def check(self, ids: list[int], truth: list[int], where: str) -> None:
        """Tokens against the truth, as far as they came."""
        wrong = sum(a != b for a, b in zip(ids, truth, strict=False))
        self.requests += 1
        self.tokens += len(ids)
        self.wrong_tokens += wrong
        if wrong and not self.first_wrong:
            self.first_wrong = where


def ask(world: World, engine: Engine, draw: random.Random, family: int) -> Iterator[tuple[Request, bool]]:
    """Requests one after the other: two prompts of the family, and a conversation of two turns sent back as text."""
    for _ in range(2):
        request = engine.submit(world.prompt(draw, family), world.params(False))
        request.result(120)
        yield request, False
    text = f"<｜User｜>where is the cat {family}?<｜Assistant｜></think>"
    for turn in range(2):
        request = engine.submit(world.tokenizer.encode(text), world.params(True), rendered=True)
        out = request.result(120)
        assert world.tokenizer.decode(request.prompt_ids) == text, "restored turns stand for other bytes"
        yield request, True
        text += out.text + f"<｜User｜>and {turn}?<｜Assistant｜></think>"


def slow_pwrite(fd: int, data: Any, offset: int, real: Callable[[int, Any, int], int] = os.pwrite) -> int:
    """A disk that takes a write in small pieces, with time between them for a signal."""
    time.sleep(0.0005)
    return real(fd, memoryview(data)[:700], offset)


def serve_until_killed(world: World, folder: Path, seed: int, pipe: int) -> None:
    """The process that will be killed; reports every finished request as a line."""
    os.write(pipe, b"\n")
    logging.disable(logging.CRITICAL)  # the restart that follows is the one that is listened to
    if seed % 2:
        os.pwrite = slow_pwrite
    draw, family, end = random.Random(seed), TEXTS * (seed // 8), time.monotonic() + 60
    cache = world.cache(folder)
    with Engine(world.model, world.tokenizer, chunk=32, prefix_cache=cache) as engine:
        while time.monotonic() < end:
            for request, is_turn in ask(world, engine, draw, family + draw.randrange(TEXTS)):
                ids = [event.id for event in request.events if event.id is not None]
                os.write(pipe, json.dumps([list(request.prompt_ids), is_turn, ids]).encode() + b"\n")


@contextlib.contextmanager
def listening(tally: Tally) -> Iterator[None]:
    """Count what the cache says in the log."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                tally.logged[str(record.msg)] += record.getMessage() not in tally.said
                tally.said.add(record.getMessage())

    logger, ear = logging.getLogger("rorqual"), Ear()
    logger.addHandler(ear)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(ear)
        logger.propagate = before


def serve(world: World, folder: Path, seed: int, families: range, tally: Tally, where: str) -> None:
    """A restart: open the folder, serve prompts from it, compare."""
    draw = random.Random(seed)
    with listening(tally):
        cache = world.cache(folder)
        with Engine(world.model, world.tokenizer, chunk=32, prefix_cache=cache) as engine:
            for family in families:
                for request, is_turn in ask(world, engine, draw, family):
                    ids = [event.id for event in request.events if event.id is not None]
                    tally.check(ids, world.truth(request.prompt_ids, is_turn), where)
                    tally.disk_tokens += 0 if request.cache is None else request.cache.disk_tokens
                    canonical = world.tokenizer.encode(world.tokenizer.decode(request.prompt_ids))
                    tally.replaced_turns += is_turn and canonical != list(request.prompt_ids)
        assert cache.disk is not None
        tally.discarded += cache.disk.stats.discarded
        cache.close()


def kill_often(world: World, folder: Path, times: int, tally: Tally) -> None:
    """Kill a process at a random moment, restart, compare; `times` times over one folder."""
    draw = random.Random(3)
    for number in range(times):
        told, pipe = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(told)
                serve_until_killed(world, folder, number, pipe)
            finally:
                os._exit(1)
        os.close(pipe)
        with os.fdopen(told, "rb") as lines:
            assert lines.readline() == b"\n"
            time.sleep(draw.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the process ended before it was killed"
            for line in lines.read().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    prompt, is_turn, ids = json.loads(line)
                    tally.check(ids, world.truth(tuple(prompt), is_turn), f"before kill {number}")
        first = TEXTS * (number // 8)
        families = range(first + number % 3, first + TEXTS, 3)
        serve(world, folder, number, families, tally, f"after kill {number}")
        if number % 20 == 19:
            measure.note(
                f"{number + 1} kills: {tally.tokens} tokens, {tally.wrong_tokens} wrong, {tally.disk_tokens} prompt "
                f"tokens from disk, {len(tally.said)} different lines in the log"
            )


Damage = Callable[[Path, list[Path], random.Random], None]


def flip(path: Path, others: list[Path], draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(3):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, others: list[Path], draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def zero(path: Path, others: list[Path], draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data))
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)


def empty(path: Path, others: list[Path], draw: random.Random) -> None:
    path.write_bytes(b"")


def exchange(path: Path, others: list[Path], draw: random.Random) -> None:
    other = draw.choice([one for one in others if one != path] or [path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def double(path: Path, others: list[Path], draw: random.Random) -> None:
    path.write_bytes(2 * path.read_bytes())


def garbage(path: Path, others: list[Path], draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(700))


DAMAGES: dict[str, Damage] = {
    "flipped bits": flip, "cut": cut, "zeroed block": zero, "emptied": empty, "exchanged": exchange,
    "doubled": double, "garbage behind": garbage,
}  # fmt: skip
KINDS = {"pages": "*.pages", "checkpoints": "*.points", "indexes": "*.index", "turns": "turns"}


def fill(world: World, folder: Path) -> None:
    """A sound folder with everything in it, twice closed so that indexes are there."""
    for _ in range(2):
        serve(world, folder, 1, range(2), Tally(), "")


def damage(world: World, sound: Path, repeats: int, tally: Tally, kinds: dict[str, Tally]) -> None:
    """Every damage to every kind of file of copies of a folder, every other time to all files of the kind."""
    draw = random.Random(5)
    for kind, pattern in KINDS.items():
        for name, harm in DAMAGES.items():
            for number in range(repeats):
                mine = kinds.setdefault(kind, Tally())
                with tempfile.TemporaryDirectory() as spare:
                    folder = Path(spare) / "cache"
                    shutil.copytree(sound, folder)
                    files = sorted(folder.rglob(pattern))
                    assert files, f"the folder has no {kind}"
                    if kind in ("pages", "checkpoints") and number % 2:  # what an index says is not read there
                        for path in folder.rglob("*.index"):
                            path.unlink()
                    for path in files if number % 3 == 2 else [draw.choice(files)]:
                        harm(path, files, draw)
                    serve(world, folder, 1, range(2), mine, f"{kind}, {name}")
    for mine in kinds.values():
        for field_name in ("requests", "tokens", "wrong_tokens", "disk_tokens", "discarded", "replaced_turns"):
            setattr(tally, field_name, getattr(tally, field_name) + getattr(mine, field_name))
        tally.logged.update(mine.logged)
        tally.first_wrong = tally.first_wrong or mine.first_wrong


class Believed(int):
    """A checksum that equals every other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def control(world: World, sound: Path) -> Tally:
    """Flipped bits in the contents of pages and checkpoints, and checksums that nobody looks at."""
    draw, tally = random.Random(9), Tally()
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(spare) / "cache"
        shutil.copytree(sound, folder)
        for pattern in ("*.pages", "*.points"):
            for path in sorted(folder.rglob(pattern)):
                data = bytearray(path.read_bytes())
                for at in range(1000, len(data) - 4, 997):  # with the indexes there, headers are not read
                    data[at - at % 4 + 2] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
        with (
            mock.patch.object(disk, "checksums", lambda rows: [Believed()] * len(rows)),
            mock.patch.object(disk, "checksum", lambda words: Believed()),
        ):
            try:
                serve(world, folder, 1, range(2), tally, "control")
            except Exception as error:  # numbers out of range may stop a request altogether
                measure.note(f"the control failed with {type(error).__name__}: {error}")
                tally.failed += 1
    return tally


def line(case: str, tally: Tally, wrong: int, more: dict[str, Any]) -> dict[str, Any]:
    """One measurement as `measure.print_line` takes it."""
    config = {
        "requests": tally.requests, "tokens": tally.tokens, "disk_tokens": tally.disk_tokens,
        "records_discarded_when_read": tally.discarded, "restored_turns": tally.replaced_turns,
        "logged": dict(tally.logged), **more, **measure.machine(),
    }  # fmt: skip
    return {
        "name": f"kill_disk_cache.{case}", "case": f"{case}/random/1t/fp32", "unit": "wrong tokens",
        "ours": tally.wrong_tokens, "peer": wrong, "peer_name": "control without checksums", "ratio": None, "bound": 0,
        "bound_share": float(not tally.wrong_tokens), "spread": {}, "config": config,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="20 kills, every damage once")
    parser.add_argument("--kills", type=int, help="how often (200)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["the cat sat on the mat; unable, stable tables " * 30], 300)
    model = high_entropy(small_config(vocab_size=tokenizer.vocab_size, compress_ratios=[0, 4, 8, 4]))
    world = World(model, tokenizer)
    kills, repeats = args.kills or (20 if args.quick else 200), 1 if args.quick else 6
    killed, damaged, kinds = Tally(), Tally(), dict[str, Tally]()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        kill_often(world, Path(folder) / "killed", kills, killed)
        seconds = time.monotonic() - began
        sound = Path(folder) / "sound"
        fill(world, sound)
        damage(world, sound, repeats, damaged, kinds)
        wrong = control(world, sound)
    by_kind = {
        kind: {"wrong_tokens": one.wrong_tokens, "discarded": one.discarded, "logged": sum(one.logged.values())}
        for kind, one in kinds.items()
    }
    peer = wrong.wrong_tokens + wrong.failed
    measure.print_line(line("kills", killed, peer, {"kills": kills, "seconds": seconds}), as_json=args.json)
    times = len(KINDS) * len(DAMAGES) * repeats
    measure.print_line(line("damage", damaged, peer, {"damaged": times, "kinds": by_kind}), as_json=args.json)
    for one in (killed, damaged):
        if one.wrong_tokens:
            sys.exit(f"{one.wrong_tokens} wrong tokens; the first {one.first_wrong}.")
    if not peer:
        sys.exit("The control gives no wrong token either, so these figures prove nothing.")


if __name__ == "__main__":
    main()
