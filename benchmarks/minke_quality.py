"""What a bundled model can and cannot do: the figures of docs/minke.md.

    python benchmarks/minke_quality.py minke --items 200
    python benchmarks/minke_quality.py runs/minke/model --items 50 --json

* `bits_per_byte`: cross-entropy on held-out Python files in bits per byte of text, in windows of at most 511 tokens
  that start at line ends, each without the text before it. Held out are the files whose path hashes into the share
  that the recipe sets aside (`--held-out`); that none of them stands in the training set under another name is
  checked.
* `functions_that_parse`: functions of those files; the model sees up to 12 lines before, the `def` line and the
  docstring, and writes greedily until the next line that leaves the function. Counted: it wrote at least one
  statement, left the function within 160 tokens, and `ast.parse` accepts the whole. `parse_any` also counts those it
  did not leave, cut at their last whole line.
* `accuracy`: share of right answers per task family, on `test` items (entities and documents never trained on), greedy,
  with a 95 % interval, and by class within the family.
"""

import argparse
import ast
import json
import math
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rorqual import Engine, SamplingParams, load
from rorqual.data import Corpus, ShardSource, build_shard, heldout_batches, python_corpus
from rorqual.data.tasks import TaskFamily, World, families
from rorqual.model import Transformer
from rorqual.tokenizer import Tokenizer


def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, corpus: Corpus, cache: Path, limit: int
) -> dict[str, float]:
    """Bits per byte over at most `limit` held-out tokens."""
    source = ShardSource(build_shard(corpus, tokenizer, cache), tokenizer, window_tokens=511)
    lengths = torch.tensor(tokenizer.text_byte_lengths)
    nats = num_bytes = num_tokens = 0
    for batch in heldout_batches(source, 8, 512):
        with torch.inference_mode():
            logits = model(batch.tokens, segment_ids=batch.segment_ids)
        targets = batch.labels >= 0
        loss = torch.nn.functional.cross_entropy(logits[targets], batch.labels[targets], reduction="sum")
        nats += float(loss)
        num_bytes += int(lengths[batch.labels[targets]].sum())
        num_tokens += int(targets.sum())
        if num_tokens >= limit:
            break
    return {"bits_per_byte": nats / math.log(2) / num_bytes, "tokens": num_tokens, "bytes": num_bytes}


def held_out_functions(corpus: Corpus) -> Iterator[tuple[str, str]]:
    """(text before and including the def line and docstring, indentation) of every function of 3 to 20 lines."""
    for document in corpus.documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        lines = document.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
                continue
            documented = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if documented else node.body
            if not body or not 3 <= node.end_lineno - node.lineno <= 20 or body[0].lineno == node.lineno:
                continue
            indent = lines[node.lineno - 1][: len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())]
            begin = max(0, node.lineno - 1 - 12)
            yield "".join(lines[begin : body[0].lineno - 1]), indent


def completed(prompt: str, indent: str, text: str) -> tuple[str, bool]:
    """The function as completed (dedented source), and whether the model left it by itself."""
    body: list[str] = []
    finished = False
    for line in text.splitlines(keepends=True):
        if line.strip() and len(line) - len(line.lstrip()) <= len(indent):
            finished = True
            break
        body.append(line)
    if not finished and body and not body[-1].endswith("\n"):
        body.pop()
    lines = prompt.splitlines(keepends=True)
    start = max(i for i, line in enumerate(lines) if line.startswith((indent + "def ", indent + "async def ")))
    return textwrap.dedent("".join([*lines[start:], *body])), finished


def parses(source: str) -> bool:
    """Whether the source is one function with at least one statement besides its docstring."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    function = tree.body[0]
    return len(function.body) > (ast.get_docstring(function, clean=False) is not None)


def functions_that_parse(engine: Engine, tokenizer: Tokenizer, corpus: Corpus, count: int) -> dict[str, Any]:
    """Complete `count` held-out functions, spread evenly over the held-out files."""
    found = list(held_out_functions(corpus))
    chosen = found[:: max(1, len(found) // count)][:count]
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode(p, allow_special=False)] for p, _ in chosen]
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=160))
    ended = whole = 0
    for (prompt, indent), output in zip(chosen, outputs, strict=True):
        source, finished = completed(
            prompt, indent, output.text if output.finish_reason == "length" else output.text + "\n#"
        )
        good = parses(source)
        ended += good and finished
        whole += good
    return {"parse_finished": ended / len(chosen), "parse_any": whole / len(chosen), "functions": len(chosen)}


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, right / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (centre - half) / (1 + z * z / total), (centre + half) / (1 + z * z / total)


def accuracy(engine: Engine, tokenizer: Tokenizer, family: TaskFamily, count: int, seed: int) -> dict[str, Any]:
    """Share of right answers on `count` test items, in all and by class."""
    items = list(islice(family.items("test", seed), count))
    prompts = [tokenizer.encode(item.prompt_text()) for item in items]
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=256))
    right, classes = 0, defaultdict(list)
    for item, output in zip(items, outputs, strict=True):
        passed = family.grade(item, tokenizer.decode(list(output.ids))).passed
        right += passed
        classes[f"mode={item.thinking_mode}"].append(passed)
        for key, value in item.stratum.items():
            if key != "mode" and (isinstance(value, str | bool) or (isinstance(value, int) and value <= 8)):
                classes[f"{key}={value}"].append(passed)
    low, high = interval(right, len(items))
    by_class = {k: [sum(v) / len(v), len(v)] for k, v in sorted(classes.items()) if len(v) < len(items)}
    return {
        "accuracy": right / len(items),
        "low": low,
        "high": high,
        "items": len(items),
        "by_class": by_class,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="minke", help="bundled name or model folder")
    parser.add_argument("--items", type=int, default=200, help="test items per task family")
    parser.add_argument("--functions", type=int, default=200, help="held-out functions to complete")
    parser.add_argument("--tokens", type=int, default=200_000, help="most held-out tokens to score")
    parser.add_argument("--held-out", type=float, default=0.02, help="share that the model's recipe set aside")
    parser.add_argument("--seed", type=int, default=7, help="seed of the test items")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch (0: as it likes)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="folder of tokenised corpora")
    parser.add_argument("--quick", action="store_true", help="20 items and functions, 20,000 tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object a line (this is the only form)")
    args = parser.parse_args()
    if args.quick:
        args.items, args.functions, args.tokens = 20, 20, 20_000
    if args.threads:
        torch.set_num_threads(args.threads)
    from rorqual.checkpoint import locate

    model, tokenizer = load(args.model)
    world_file = Path(locate(args.model)) / "world.json"
    world = World.from_dict(json.loads(world_file.read_text())) if world_file.exists() else World.build()

    def show(name: str, values: dict[str, Any], began: float) -> None:
        print(
            json.dumps({"name": name, "model": args.model, **values, "seconds": time.time() - began}),
            flush=True,
        )

    train, held_out = python_corpus(include_tests=True).split(args.held_out)
    seen = {document.digest for document in train.documents}
    assert not any(document.digest in seen for document in held_out.documents)
    library = {document.digest for document in python_corpus().documents}
    parts = {
        "library and tests": held_out,
        "library": Corpus("library", tuple(d for d in held_out.documents if d.digest in library)),
    }
    for label, corpus in parts.items():
        began = time.time()
        values = bits_per_byte(model, tokenizer, corpus, args.cache, args.tokens)
        show(f"bits_per_byte.{label}", {**values, "files": len(corpus)}, began)
    with Engine(model, tokenizer, max_queued=100_000) as engine:
        began = time.time()
        show("functions_that_parse", functions_that_parse(engine, tokenizer, held_out, args.functions), began)
        for name, family in families(world.world_id, size=world.size).items():
            began = time.time()
            show(f"accuracy.{name}", accuracy(engine, tokenizer, family, args.items, args.seed), began)


if __name__ == "__main__":
    main()
