"""What constrained decoding costs: tokens/s with a grammar against without, compiling, and one mask.

    python benchmarks/constrained.py --json [--quick]

* `constrained.decode`: Minke decodes with each grammar (any JSON object, a nested schema, a strict tool call) and then
  the same number of tokens without; the peer is the free one, by turns, at a batch of 1 and of 8.
* `constrained.mask`: microseconds for one token's mask, applied to the scores, in the middle of a reply; with Minke's
  vocabulary and with one of 129,280 tokens, V4's number, made from it (its tokens, and pairs of them behind). The peer
  is the whole time of a token of Minke without a grammar.
* `constrained.compile`: milliseconds until a request with a grammar can start, for a grammar seen first and again
  (`ours` and `peer`).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import measure
import torch

import rorqual
from rorqual import chat
from rorqual.engine import Engine, Grammar, SamplingParams
from rorqual.engine.grammar import Grammars

NESTED: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "number"}, "kind": {"enum": ["a", "b", "c"]}},
            "required": ["x", "y", "kind"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "tags", "where"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "find", "strict": True, "parameters": NESTED}}]
GRAMMARS: dict[str, str] = {
    "json": str(chat.reply_grammar([], schema={"type": "object"})),
    "schema": str(chat.reply_grammar([], schema=NESTED)),
    "strict-call": str(chat.reply_grammar(TOOLS, forced=True)),
}
V4_VOCABULARY = 129_280
TOKENS = 160


def rate(engine: Engine, ids: list[int], params: SamplingParams, batch: int) -> tuple[float, float]:
    """Decoded tokens per second of `batch` requests, without their prompts, and how many each made."""
    done = engine.generate([ids] * batch, [params.replace(seed=i) for i in range(batch)])
    seconds = max(one.timing.decode_s for one in done)
    return sum(len(one.ids) - 1 for one in done) / seconds, statistics.mean(len(one.ids) for one in done)


def decode(threads: int, repeats: int, as_json: bool) -> float:
    """Prints the lines; returns the seconds of a free token at batch 1."""
    torch.set_num_threads(threads)
    model, tokenizer = rorqual.load("minke")
    model.to(torch.bfloat16)
    prompt = chat.render_messages([{"role": "user", "content": "Describe a house as JSON."}], thinking_mode="chat")
    ids = tokenizer.encode_guarded(list(prompt.pieces()))
    free_s = 0.0
    with Engine(model, tokenizer) as engine:
        for batch in (1, 8):
            for name, lark in GRAMMARS.items():
                suppressed = chat.suppressed_ids(tokenizer, tools=True)
                held = SamplingParams(max_tokens=TOKENS, suppress_token_ids=suppressed, grammar=Grammar(lark))
                rate(engine, ids, held, batch)
                ours, peer, counts = [], [], []
                for _ in range(repeats):
                    speed, count = rate(engine, ids, held, batch)
                    ours.append(speed)
                    counts.append(count)
                    eos = (*suppressed, tokenizer.eos_token_id)  # as many tokens, whatever the model wants
                    free = SamplingParams(max_tokens=max(2, round(count)), suppress_token_ids=eos)
                    peer.append(rate(engine, ids, free, batch)[0])
                free_s = free_s or 1 / measure.middle(peer)
                case = f"{name}-{batch}/minke/{threads}t/bf16"
                print_line("decode", case, "tokens/s", ours, peer, "without a grammar", {"tokens": counts}, as_json)
    return free_s


def masks(free_s: float, threads: int, as_json: bool) -> None:
    tokenizer = rorqual.load("minke")[1]
    for words, of in ((tokenizer, "minke"), (enlarged(tokenizer), "v4-size")):
        grammars = Grammars(words, words.vocab_size)
        for name, lark in GRAMMARS.items():
            first, again = (timed(partial(grammars.constraint, Grammar(lark))) for _ in range(2))
            case = f"{name}/{of}/{threads}t/fp32"
            print_line("compile", case, "ms", [1e3 * first], [1e3 * again], "seen before", {}, as_json, lower=True)
            constraint = grammars.constraint(Grammar(lark))
            draw = torch.Generator().manual_seed(0)
            times = []
            for _ in range(200):
                scores = torch.randn(words.vocab_size, generator=draw)
                began = time.perf_counter()
                held = constraint.apply(scores)
                times.append(time.perf_counter() - began)
                token = int(torch.multinomial(torch.softmax(held, -1), 1, generator=draw))
                if token == words.eos_token_id:
                    constraint = grammars.constraint(Grammar(lark))
                else:
                    constraint.advance(token)
            print_line("mask", case, "us", [1e6 * measure.middle(times)], [1e6 * free_s], "a free token of Minke",
                       {"p99_us": 1e6 * sorted(times)[198]}, as_json, lower=True)  # fmt: skip


def enlarged(tokenizer: Any) -> Any:
    """A vocabulary of V4's size: this tokenizer's tokens, and pairs of its text tokens behind them."""
    size = tokenizer.vocab_size
    own = [tokenizer.token_bytes(i) for i in range(size)]
    texts = [word for i, word in enumerate(own) if i not in tokenizer.control_token_ids]
    pairs = dict.fromkeys(a + b for a in texts for b in texts[:: max(1, len(texts) ** 2 // (2 * V4_VOCABULARY))])
    for word in own:
        pairs.pop(word, None)
    words = [*own, *list(pairs)[: V4_VOCABULARY - size]]
    return SimpleNamespace(
        vocab_size=len(words), eos_token_id=tokenizer.eos_token_id, control_token_ids=tokenizer.control_token_ids,
        token_bytes=words.__getitem__, token_id=tokenizer.token_id, encode=tokenizer.encode,
    )  # fmt: skip


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def print_line(
    name: str, case: str, unit: str, ours: list[float], peer: list[float], peer_name: str, more: dict[str, Any],
    as_json: bool, lower: bool = False,
) -> None:  # fmt: skip
    a, b = measure.middle(ours), measure.middle(peer)
    line = {
        "name": f"constrained.{name}", "case": case, "unit": unit, "ours": a, "peer": b, "peer_name": peer_name,
        "ratio": b / a if lower else a / b, "bound": None, "bound_share": 0, "spread": measure.spread(ours, peer),
        "config": {**more, "machine": measure.machine()},
    }  # fmt: skip
    measure.print_line(line, as_json=as_json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat, one thread")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for threads in (1,) if args.quick else (1, 2):
        free_s = decode(threads, 1 if args.quick else args.repeats, args.json)
        masks(free_s, threads, args.json)


if __name__ == "__main__":
    main()
