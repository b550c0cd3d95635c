"""Random and mutated bytes through every parser of untrusted text: nothing may raise, hang or leak markup.

    python scripts/fuzz_parsers.py [--cases 1000000] [--seed 0] [--jobs 2] [--json]

A case is a reply of the model as bytes (noise, pieces of markup in any order, or a well-formed reply with bytes
changed, dropped, doubled or moved), decoded as a server decodes them, cut at random and given to `chat.StreamParser` in
both modes, and whole to `chat.parse_completion` (which may refuse it, with a RequestError only). The same text as the
arguments of an earlier call goes through the encoder, and so do calls as they were read. Case number N of seed S is
always the same, so a failure is found again with `--only N`. Prints the cases done, the slowest and, with exit code 1,
those that failed.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.progress import Progress

from rorqual import chat
from rorqual.chat import markers
from rorqual.errors import RequestError

SOUND = (
    "I look.</think>Wait <b>.\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="run">\n<｜DSML｜parameter name="cmd" string="true">ls "é"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">[1, {"a": null}]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="stop">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>'
).encode()
WORDS = [
    *(marker.encode() for marker in markers.FORBIDDEN_IN_REPLY),
    *(tag.encode() for tag in (markers.CALLS_OPEN, markers.CALLS_CLOSE, markers.INVOKE_OPEN, markers.INVOKE_CLOSE)),
    *(tag.encode() for tag in (markers.PARAMETER_OPEN, markers.PARAMETER_CLOSE)),
    *(
        b"<",
        b"</",
        b">",
        b'"',
        b"\n",
        b' name="a"',
        b' string="true"',
        b' string="false"',
        b"{",
        b"]",
        b"\\u12",
        b"\xff",
    ),
    *(b"\xef\xbd", b"\xf0\x9f\x90\x8b", b"\xe2\x96\x81", b"\x00", b"a", b" ", b"1e999", b"<tool_result>"),
]
TOOLS: Any = [
    {"type": "function", "function": {"name": "run", "parameters": {"properties": {"n": {"type": "integer"}}}}}
]
MOST_SECONDS = 2.0
"""A case that takes longer hangs, as far as anybody waiting can tell."""


def case(seed: int, number: int) -> tuple[str, random.Random]:
    """The text of a case, and what else is drawn for it."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.randrange(3)
    if kind == 0:
        data = draw.randbytes(draw.randrange(60))
    elif kind == 1:
        data = b"".join(draw.choices(WORDS, k=draw.randrange(30)))
    else:
        changed = bytearray(SOUND)
        for _ in range(draw.randrange(1, 8)):
            a, b = sorted(draw.randrange(len(changed) + 1) for _ in range(2))
            b = min(b, a + draw.choice([1, 2, 5, 40]))
            piece = draw.choice([b"", draw.randbytes(b - a), bytes(changed[a:b]) * 2, draw.choice(WORDS)])
            changed[a:b] = piece
            if not changed:
                break
        data = bytes(changed)
    return data.decode("utf-8", "replace"), draw


def run(seed: int, number: int) -> str | None:
    """What is wrong about a case; None if nothing is."""
    text, draw = case(seed, number)
    for mode in markers.THINKING_MODES:
        parser = chat.StreamParser(mode, TOOLS, accept_variants=draw.random() < 0.3)
        at = 0
        while at < len(text):
            size = draw.choice([1, 2, 3, 7, 50])
            parser.feed(text[at : at + size])
            at += size
        parser.finish(draw.choice([None, "stop", "length"]))
        message = parser.result.message
        shown = message["content"] + (message["reasoning_content"] or "")
        leaked = next((marker for marker in markers.FORBIDDEN_IN_REPLY if marker in shown), None)
        if leaked is not None:
            return f"{leaked!r} reached the content in {mode} mode"
        for call in message["tool_calls"]:
            if not isinstance(json.loads(call["function"]["arguments"]), dict):
                return "arguments that are no object"
        if message["tool_calls"]:
            pairs = zip(message["tool_calls"], parser.result.sampled, strict=True)
            calls = [{**call, "sampled_parameters": sampled} for call, sampled in pairs]
            again = chat.encode_messages([{"role": "user", "content": "x"}, {**message, "tool_calls": calls}], TOOLS)
            if not all(
                value in again and value in text for sampled in parser.result.sampled for _, value, _ in sampled
            ):
                return "a parameter is not shown again as it was sampled"
        for strict in (True, False):
            try:
                chat.parse_completion(text, thinking_mode=mode, strict=strict)
            except RequestError:
                if not strict:
                    return "the tolerant form refused a text"
    call = {"id": "c", "type": "function", "function": {"name": "run", "arguments": text}}
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text, "tool_calls": [call]}]
    with contextlib.suppress(RequestError):  # such as JSON that is no object
        chat.encode_messages([*messages, {"role": "tool", "tool_call_id": "c", "content": text}], TOOLS)
    return None


def run_many(job: tuple[int, int, int]) -> tuple[int, float, int, list[str]]:
    """Cases [begin, end) of a seed: how many, the slowest in seconds and its number, and what failed."""
    seed, begin, end = job
    slowest, which, failures = 0.0, begin, []
    for number in range(begin, end):
        began = time.perf_counter()
        try:
            wrong = run(seed, number)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
        if seconds > slowest:
            slowest, which = seconds, number
        if seconds > MOST_SECONDS:
            wrong = wrong or f"took {seconds:.1f} s"
        if wrong is not None:
            failures.append(f"case {number} of seed {seed}: {wrong}"[:300])
    return end - begin, slowest, which, failures


def batches(seed: int, cases: int, size: int = 2000) -> Iterator[tuple[int, int, int]]:
    for begin in range(0, cases, size):
        yield seed, begin, min(cases, begin + size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, help="show one case and what becomes of it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.only is not None:
        print(repr(case(args.seed, args.only)[0]), run(args.seed, args.only), sep="\n")
        return 0
    done, slowest, which, failures = 0, 0.0, 0, []
    began = time.perf_counter()
    with multiprocessing.Pool(args.jobs) as pool, Progress(disable=args.json) as progress:
        bar = progress.add_task("cases", total=args.cases)
        for count, seconds, number, failed in pool.imap_unordered(run_many, batches(args.seed, args.cases)):
            done += count
            failures += failed
            if seconds > slowest:
                slowest, which = seconds, number
            progress.update(bar, advance=count)
    figures = {
        "name": "fuzz_parsers", "cases": done, "failures": len(failures), "slowest_s": round(slowest, 4),
        "slowest_case": which, "seconds": round(time.perf_counter() - began, 1), "examples": failures[:5],
    }  # fmt: skip
    print(json.dumps(figures) if args.json else figures)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
