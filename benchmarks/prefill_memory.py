"""Memory of a long prefill above the weights: ours and transformers' `DeepseekV4ForCausalLM`, same weights,
same tokens.

    python benchmarks/prefill_memory.py --json [--quick] [--length 32768] [--model minke]

Each measurement is a process of its own. It loads the model (fp32), runs 64 tokens once so that libraries
are warm, notes its resident size, resets the peak, reads the whole prompt in one call that fills a cache and
returns the last position's logits, and reports the peak minus the noted size. The weights are the bundled
model's, or drawn where none is bundled.

The peer is tried at every length under a cap on its address space (16 GiB above the loaded model, less on a
smaller machine), because its attention builds tensors of S x S. Where it fails, the line says how, which
single tensor it must build at least, and what its measured peaks at shorter lengths grow to.

The bound is what any implementation must hold at the end: the residual streams of the prompt and the cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

PEER = "transformers"
PEER_CAP_BYTES = 16 << 30
TIME_LIMIT_S = 600


def prompt(length: int, vocab_size: int) -> Any:
    """The same tokens in every process [1, length]."""
    import torch

    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(3))


def export(model_name: str, folder: Path) -> str:
    """Write the model in both layouts; returns which weights they are."""
    import rorqual
    from rorqual.errors import RorqualError
    from rorqual.model import Transformer, init_weights

    try:
        model, _ = rorqual.load(model_name)
        weights = "bundled"
    except RorqualError:
        model = Transformer(rorqual.ModelConfig.preset(model_name))
        init_weights(model, 0)
        weights = "drawn"
    rorqual.checkpoint.save_official(model.float(), folder / "ours")
    rorqual.checkpoint.save_transformers(model, folder / "peer")
    return weights


def cap_address_space(extra_bytes: int) -> None:
    """Let this process map at most so much more; an allocation beyond it fails instead of filling the
    machine.
    """
    import resource

    limit = measure.process_bytes("VmSize") + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_child(who: str, folder: Path, length: int, threads: int, cap_bytes: int) -> None:
    """One measurement; prints one JSON object."""
    import torch

    torch.set_num_threads(threads)
    found: dict[str, Any] = {"length": length}
    if who == "ours":
        import rorqual

        model = rorqual.checkpoint.load_official(folder / "ours").float().eval()
        tokens = prompt(length, model.cfg.vocab_size)

        def prefill(tokens: Any) -> tuple[Any, int]:
            state = model.new_state()
            streams = model.forward_streams(tokens, state=state)
            logits = model.logits(model.final_hidden(streams[:, -1:]))[0, 0]
            held = streams.numel() * streams.element_size() + sum(state.nbytes().values())
            return logits, held
    else:
        from transformers import DeepseekV4ForCausalLM

        peer = DeepseekV4ForCausalLM.from_pretrained(
            folder / "peer", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokens = prompt(length, peer.config.vocab_size)

        def prefill(tokens: Any) -> tuple[Any, int]:
            out = peer(tokens, use_cache=True, logits_to_keep=1)
            return out.logits[0, 0], 0

    with torch.inference_mode():
        prefill(tokens[:, :64])
        if cap_bytes:
            cap_address_space(cap_bytes)
        before = measure.process_bytes("VmRSS")
        measure.forget_peak()
        start = time.perf_counter()
        try:
            logits, held = prefill(tokens)
        except (MemoryError, RuntimeError) as error:
            found["failure"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        else:
            found |= {"seconds": time.perf_counter() - start, "held_bytes": held, "logits": logits.tolist()}
        found["peak_bytes"] = measure.process_bytes("VmHWM") - before
        found["loaded_bytes"] = before
    print(json.dumps(found))


def spawn(who: str, folder: Path, length: int, threads: int, cap_bytes: int = 0) -> dict[str, Any]:
    """A measurement in a process of its own; a failure of any kind becomes words."""
    command = [sys.executable, __file__, "--child", who, "--folder", str(folder), "--length", str(length)]
    command += ["--threads", str(threads), "--cap-bytes", str(cap_bytes)]
    measure.note(f"{who}: {length} tokens")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failure": f"not finished after {TIME_LIMIT_S} s"}
    if done.returncode < 0:
        return {"failure": f"killed by signal {-done.returncode}"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failure": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def largest_peer_tensor(config: Any, length: int) -> int:
    """Bytes of one attention score tensor of the peer: heads x S x (S + entries), fp32; it holds several at
    once.
    """
    entries = max((length // spec.compress_ratio for spec in config.layers if spec.compress_ratio), default=0)
    return 4 * config.num_attention_heads * length * (length + entries)


def available_bytes() -> int:
    """Memory that can be given out now, or the cap where the system does not say."""
    info = Path("/proc/meminfo")
    if info.exists():
        for row in info.read_text().splitlines():
            if row.startswith("MemAvailable:"):
                return int(row.split()[1]) * 1024
    return PEER_CAP_BYTES


def relative_distance(a: list[float], b: list[float]) -> float:
    """Distance of two rows of logits relative to the second."""
    return (sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum(y * y for y in b)) ** 0.5


def case_line(
    config: Any, length: int, ours: list[dict[str, Any]], peer: list[dict[str, Any]], details: dict[str, Any]
) -> dict[str, Any]:
    """The finished JSON object of one length."""
    for one in ours:
        if "failure" in one:
            raise SystemExit(f"ours failed at {length} tokens: {one['failure']}")
    a = [float(one["peak_bytes"]) for one in ours]
    b = [float(one["peak_bytes"]) for one in peer if "failure" not in one]
    held = float(ours[0]["held_bytes"])
    line: dict[str, Any] = {
        "name": "prefill_memory",
        "case": f"{measure.length_name(length)}/{details['model']}/{details['threads']}t/fp32",
        "unit": "bytes above weights",
        "ours": measure.middle(a),
        "peer": measure.middle(b) if b else None,
        "peer_name": PEER,
        "ratio": measure.middle(b) / measure.middle(a) if b else None,
        "bound": held,
        "bound_share": held / measure.middle(a),
        "spread": measure.spread(a, b),
        "config": {**details, "seconds": measure.middle([one["seconds"] for one in ours])},
    }
    if b:
        both = [one for one in peer if "failure" not in one][0]
        line["config"]["peer_seconds"] = both["seconds"]
        line["config"]["last_logits_distance"] = relative_distance(ours[0]["logits"], both["logits"])
    else:
        line["peer_failure"] = peer[0]["failure"]
        line["peer_largest_tensor_bytes"] = largest_peer_tensor(config, length)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="one repeat, two shorter lengths instead of three")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--model", default="minke", help="a bundled model or a preset")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cap-bytes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, options.folder, options.length, options.threads, options.cap_bytes)
        return

    repeats = 1 if options.quick else options.repeats
    shorter = [2048, 4096] if options.quick else [2048, 4096, 8192]
    cap = min(PEER_CAP_BYTES, int(0.8 * available_bytes()))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = export(options.model, folder)
        import rorqual

        config = rorqual.ModelConfig.from_file(folder / "ours" / "config.json")
        details = {
            "model": options.model,
            "weights": weights,
            "threads": options.threads,
            "peer_cap_bytes": cap,
        }
        details |= {
            "repeats": repeats,
            "batch": 1,
            **{k: v for k, v in measure.machine().items() if k != "threads"},
        }
        peaks: list[tuple[int, float]] = []
        for length in [*[n for n in shorter if n < options.length], options.length]:
            ours = [spawn("ours", folder, length, options.threads) for _ in range(repeats)]
            peer = [spawn("peer", folder, length, options.threads, cap)]
            if "failure" not in peer[0]:
                peer += [spawn("peer", folder, length, options.threads, cap) for _ in range(repeats - 1)]
            line = case_line(config, length, ours, peer, details)
            if line["peer"] is not None:
                peaks.append((length, line["peer"]))
            elif peaks:  # quadratic growth from the longest length that ran
                line["peer_extrapolated_bytes"] = peaks[-1][1] * (length / peaks[-1][0]) ** 2
            measure.print_line(line, as_json=options.json)


if __name__ == "__main__":
    main()
