"""Reading a prompt: tokens per second from 1K to 1M, against transformers where it can run, and a million tokens whole.

    python benchmarks/prefill.py --json [--quick] [--lengths 1K,8K] [--models small,minke] [--million]

`prefill`: a prompt of random tokens goes through `Transformer.step` in chunks, as the engine feeds it, and ends with
the logits of its last token. Up to 8K the peer reads the same prompt with the same weights and its own cache. It is
given its best chunk: a pilot run tries several, because its compressed attention gathers entries for all queries of a
call at once and slows down with long calls. `prefill.best` compares our faster dtype with the peer's faster one.
`config` has the peer's rate of each chunk, and `ratio_of_one_call` compares with its whole prompt in one call, which is
what its own generation does.

Up to 32K (128K without --quick) the prompt is really read. Beyond, chunks are timed at nine places whose state is
filled with random entries of the sizes that so many tokens leave, and the time of the whole is their integral.

`prefill.million` (with --million) reads 1,048,576 random tokens with the bundled Minke in a process of its own and says
how long it took, its peak resident memory, and whether the last logits have the same bits three ways: the end in one
chunk, the end token by token, and a second process that reads with other chunks (--second-chunk; 0: the prompt in one
call, which takes 2.5 GiB). `prefill.exact` does the same at 32K with every way of cutting. The bound of these two is no
limit of the machine but what is wanted: a million tokens in 15 minutes.

The bound is the rate of a matrix product of torch in the same dtype, measured in the same run, over the operations of
`rorqual.planner.flops` without the mixing of streams and with the head for one token only: 2 for each activated weight,
scores and sums of attention over the keys that a query reads, products of the index scan. Norms, rope, softmax, top-k
and the like are work too, but not counted.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from decode import DTYPES, filled_state
from peers import CONFIG, PEER, build_pair, check_agreement
from torch import Tensor

import rorqual
from rorqual.model import Segment, State, Transformer
from rorqual.planner.flops import forward_flops

LENGTHS = {"1K": 1 << 10, "8K": 1 << 13, "32K": 1 << 15, "128K": 1 << 17, "1M": 1 << 20}
PEER_UP_TO = 8192
PEER_CHUNKS = (256, 512, 1024, 2048)
CHUNK = 2048
TAIL = 64  # tokens of the end that are read again one by one
PLACES = 9
WANTED = (1 << 20) / 900.0  # tokens/s: a million in 15 minutes


def config_of(name: str) -> rorqual.ModelConfig:
    """`small` is the file beside this one, others are presets; without MTP."""
    if name == "small":
        return rorqual.ModelConfig.from_dict(json.loads(CONFIG.read_text()))
    return rorqual.ModelConfig.preset(name).replace(num_nextn_predict_layers=0)


def prompt_of(model: Transformer, length: int) -> Tensor:
    """The same random ids [length] in every process."""
    return torch.randint(0, model.cfg.vocab_size, (length,), generator=torch.Generator().manual_seed(4))


def read(model: Transformer, state: State, tokens: Tensor, chunk: int) -> Tensor:
    """Feed tokens [S] in chunks; the logits [V] behind the last one."""
    for part in tokens.split(chunk):
        streams = model.step([Segment(state, part)])
    return model.logits(model.final_hidden(streams[:, -1:]))[0, 0]


def matrix_flops(model: Transformer, length: int) -> float:
    """Operations per token as the module's text counts them, for a prompt of `length` tokens."""
    count = forward_flops(model.cfg, length, model)
    return count.total - count.mixing - 2.0 * model.head.weight.numel()


def ours_run(model: Transformer, tokens: Tensor) -> Callable[[], measure.Rate]:
    """A function that reads the prompt once."""

    def run() -> measure.Rate:
        watch = measure.Stopwatch()
        read(model, model.new_state(), tokens, CHUNK)
        return watch.rate(len(tokens))

    return run


def peer_run(peer: Any, tokens: Tensor, chunk: int) -> Callable[[], measure.Rate]:
    """The same for the peer."""

    def run() -> measure.Rate:
        watch, cache = measure.Stopwatch(), None
        for part in tokens[None].split(chunk, 1):
            cache = peer(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        return watch.rate(len(tokens))

    return run


def pilot(peer: Any, tokens: Tensor, chunks: tuple[int, ...]) -> dict[int, float]:
    """Tokens per second of the peer by its chunk."""
    sizes = sorted({min(chunk, len(tokens)) for chunk in chunks})
    return {size: peer_run(peer, tokens, size)().wall for size in sizes}


def by_places(model: Transformer, length: int) -> float:
    """Tokens per second of a long prompt, from chunks timed at places of it."""
    seconds: list[float] = []
    for place in range(PLACES):
        at = (length - CHUNK) * place // (PLACES - 1) // CHUNK * CHUNK
        state = filled_state(model, at) if at else model.new_state()
        part = prompt_of(model, CHUNK)
        watch = measure.Stopwatch()
        read(model, state, part, CHUNK)
        seconds.append(1.0 / watch.rate(CHUNK).wall)
    inner = sum(seconds[1:-1]) + (seconds[0] + seconds[-1]) / 2
    return (PLACES - 1) / inner


def measure_length(
    model: Transformer, peer: Any, name: str, length: int, dtype: str, read_up_to: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One line `prefill`."""
    tokens = prompt_of(model, min(length, read_up_to))
    a: list[measure.Rate] = []
    b: list[measure.Rate] = []
    rates: dict[int, float] = {}
    is_read = length <= read_up_to
    if peer is not None and length <= PEER_UP_TO:
        rates = pilot(peer, tokens, (*(PEER_CHUNKS[1::2] if options.quick else PEER_CHUNKS), length))
        best = max(rates, key=lambda size: rates[size])
        a, b = measure.interleaved(ours_run(model, tokens), peer_run(peer, tokens, best), options.repeats)
    elif is_read:
        run = ours_run(model, tokens)
        a = [run() for _ in range(options.repeats + (length <= PEER_UP_TO))][-options.repeats :]
    walls = [rate.wall for rate in a] if is_read else [by_places(model, length) for _ in range(options.repeats)]
    mine, theirs = measure.middle(walls), measure.middle([rate.wall for rate in b]) if b else None
    flops = matrix_flops(model, length)
    ceiling = max(measure.matmul_flops_per_s(size, 0.5, DTYPES[dtype]) for size in (768, 1536))
    return {
        "name": "prefill",
        "case": f"{length_name(length)}/{name}/{torch.get_num_threads()}t/{dtype}",
        "unit": "tokens/s",
        "ours": mine,
        "peer": theirs,
        "peer_name": PEER,
        "ratio": None if theirs is None else mine / theirs,
        "ratio_of_one_call": mine / rates[length] if rates else None,
        "peer_failure": None if theirs is not None else "not run in this case: the case 8K/small has it",
        "bound": ceiling / flops,
        "bound_share": mine * flops / ceiling,
        "spread": measure.spread(walls, [rate.wall for rate in b]),
        "config": {
            "chunk": CHUNK, "peer_tokens_per_s_by_chunk": rates, "repeats": len(walls), "model": name,
            "state": "read" if is_read else "random", "seconds": length / mine, "matrix_flops_per_token": flops,
            "matmul_flops_per_s": ceiling, **measure.machine(),
        },
    }  # fmt: skip


def best_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Our faster dtype against the peer's faster one, at one length and number of threads."""
    mine = max(lines, key=lambda line: line["ours"])
    theirs = max(lines, key=lambda line: line["peer"])
    length, name, threads, _ = mine["case"].split("/")
    return mine | {
        "name": "prefill.best",
        "case": f"{length}/{name}/{threads}/best",
        "peer": theirs["peer"],
        "ratio": mine["ours"] / theirs["peer"],
        "ratio_of_one_call": min(mine["ours"] / line["ours"] * line["ratio_of_one_call"] for line in lines),
        "config": mine["config"]
        | {
            "ours_dtype": mine["case"].rsplit("/", 1)[1],
            "peer_dtype": theirs["case"].rsplit("/", 1)[1],
            "peer_tokens_per_s_by_chunk": theirs["config"]["peer_tokens_per_s_by_chunk"],
        },
    }


def length_name(length: int) -> str:
    """`1048576` -> `1M`."""
    return "1M" if length == 1 << 20 else measure.length_name(length)


def digest(logits: Tensor) -> str:
    """A name for the bits of a row of logits."""
    return hashlib.blake2b(logits.float().contiguous().numpy().tobytes(), digest_size=12).hexdigest()


def child(name: str, length: int, dtype: str, threads: int, chunk: int) -> None:
    """Read a prompt in this process and print what it took as one JSON object."""
    torch.set_num_threads(threads)
    model = rorqual.load(name)[0] if name == "minke" else Transformer(config_of(name))
    model = model.eval().to(DTYPES[dtype])
    tokens = prompt_of(model, length)
    with torch.inference_mode():
        watch, state, began = measure.Stopwatch(), model.new_state(), time.perf_counter()
        head, done = tokens[: length - TAIL], 0
        for part in head.split(chunk or length):
            model.step([Segment(state, part)])
            done += len(part)
            if done // (1 << 16) > (done - len(part)) // (1 << 16):
                measure.note(f"{done:,} tokens, {done / (time.perf_counter() - began):,.0f} tokens/s")
        other = state.rows([0])
        whole = read(model, state, tokens[length - TAIL :], TAIL)
        rate = watch.rate(length)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        single = read(model, other, tokens[length - TAIL :], 1)
    found = {
        "seconds": length / rate.wall, "cpu_seconds": length / rate.cpu, "peak_bytes": peak,
        "state_bytes": state.nbytes()["total"], "logits": digest(whole), "token_by_token": digest(single),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def spawn(name: str, length: int, dtype: str, threads: int, chunk: int) -> dict[str, Any]:
    """`child` in a process of its own."""
    arguments = ["--child", name, str(length), dtype, str(threads), str(chunk)]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def whole_line(kind: str, name: str, length: int, dtype: str, threads: int, chunks: list[int]) -> dict[str, Any]:
    """One line about a prompt read whole by one process for each way of cutting it."""
    runs = {chunk: spawn(name, length, dtype, threads, chunk) for chunk in chunks}
    first = runs[chunks[0]]
    bits = {run[key] for run in runs.values() for key in ("logits", "token_by_token")}
    return {
        "name": f"prefill.{kind}",
        "case": f"{length_name(length)}/{name}/{threads}t/{dtype}",
        "unit": "tokens/s",
        "ours": length / first["seconds"],
        "peer": None,
        "peer_name": PEER,
        "ratio": None,
        "peer_failure": "not run: its scores are prompt x prompt",
        "bound": WANTED,
        "bound_share": length / first["seconds"] / WANTED,
        "spread": measure.spread([length / run["seconds"] for run in runs.values()], []),
        "config": {
            "bound_is": "a million tokens in 15 minutes", "same_bits": len(bits) == 1,
            "runs": {"whole" if not chunk else str(chunk): run for chunk, run in runs.items()}, **measure.machine(),
        },
    }  # fmt: skip


def measure_model(name: str, lengths: list[int], threads: int, options: argparse.Namespace) -> None:
    """All lines of one network at one number of threads."""
    ours, peer = build_pair(config_of(name))
    by_length: dict[int, list[dict[str, Any]]] = {}
    with torch.inference_mode():
        check_agreement(ours, peer, prompt_of(ours, 512)[None])
        for dtype in options.dtypes:
            ours.eval().to(DTYPES[dtype]), peer.eval().to(DTYPES[dtype])
            for length in lengths:
                rival = peer if name == "small" else None
                read_up_to = LENGTHS["32K" if options.quick else "128K"]
                line = measure_length(ours, rival, name, length, dtype, read_up_to, options)
                measure.print_line(line, as_json=options.json)
                if line["peer"] is not None:
                    by_length.setdefault(length, []).append(line)
    for lines in by_length.values():
        measure.print_line(best_of(lines), as_json=options.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat, two threads, 1K to 32K read, beyond by places"
    )
    parser.add_argument("--lengths", default=",".join(LENGTHS), help="which prompts (default: %(default)s)")
    parser.add_argument("--models", default="small,minke", help="small or presets (default: %(default)s)")
    parser.add_argument("--dtypes", default="bf16,fp32", help="bf16, fp32 or both (default: both)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--million", action="store_true", help="read 1,048,576 tokens with Minke; twice 15 minutes at most"
    )
    parser.add_argument("--second-chunk", type=int, default=0, help="chunk of the second such run; 0: all at once")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, length, dtype, threads, chunk = options.child
        child(name, int(length), dtype, int(threads), int(chunk))
        return
    options.dtypes = options.dtypes.split(",")
    options.repeats = 1 if options.quick else options.repeats
    unknown = [one for one in options.lengths.split(",") if one and one not in LENGTHS]
    if unknown:
        parser.error(f"no prompt is called {', '.join(unknown)}; choose from {', '.join(LENGTHS)}")
    lengths = [LENGTHS[one] for one in options.lengths.split(",") if one]
    for threads in (2,) if options.quick else (1, 2):
        torch.set_num_threads(threads)
        for name in options.models.split(",") if lengths else ():
            measure_model(name, lengths, threads, options)
    measure.print_line(whole_line("exact", "minke", 1 << 15, "bf16", 2, [CHUNK, 1000, 0]), as_json=options.json)
    if options.million:
        chunks = [CHUNK, options.second_chunk]
        measure.print_line(whole_line("million", "minke", 1 << 20, "bf16", 2, chunks), as_json=options.json)


if __name__ == "__main__":
    main()
