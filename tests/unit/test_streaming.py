"""Experts streamed from disk: the logits of the model that is loaded whole, bit by bit, however small the cache."""

import gc
import re
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from small_models import build, packable_config
from torch import Tensor

from rorqual import checkpoint
from rorqual.checkpoint import CacheStats, MemoryBudget, direct_io
from rorqual.checkpoint.streaming import dense_bytes
from rorqual.engine import Engine, SamplingParams, exactness
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Segment, Transformer
from rorqual.ops import registry
from rorqual.server.metadata import metrics
from rorqual.server.served import ServedModel

torch.set_num_threads(1)

CONFIG = packable_config()
TOKENS = torch.randint(0, CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
TOP, COUNT = CONFIG.num_experts_per_tok, CONFIG.n_routed_experts
ALL = COUNT * (CONFIG.num_hidden_layers + 1)  # the MTP module has experts too


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model as the released files store it, as the base ones do, and in bf16; in shards."""
    root, model = tmp_path_factory.mktemp("stored"), build(CONFIG)
    for kind in ("fp4", "fp8"):
        checkpoint.save_official(model, root / kind, experts=kind, shard_bytes=1000)
    checkpoint.save_official(model, root / "bf16", dtype=torch.bfloat16)
    return {kind: root / kind for kind in ("fp4", "fp8", "bf16")}


def streamed(folder: Path, experts: int, weights: str | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model with a cache of so many experts."""
    probe = checkpoint.load_official(folder, weights=weights, memory=MemoryBudget(cache=1 << 30))
    cache = MemoryBudget(cache=experts * probe.expert_cache.reader.slot_bytes)
    return checkpoint.load_official(folder, weights=weights, dtype=dtype, memory=cache).eval()


def whole(folder: Path, weights: str, dtype: torch.dtype = torch.float32) -> Transformer:
    return checkpoint.load_official(folder, weights=weights, dtype=dtype).eval()


def decode(model: Transformer, prompt: int) -> Tensor:
    """Logits of a prompt and of the tokens after it, fed one by one."""
    state = model.new_state(batch_size=2)
    out = [model(TOKENS[:, :prompt], state=state)]
    return torch.cat([*out, *(model(TOKENS[:, i : i + 1], state=state) for i in range(prompt, 40))], 1)


@pytest.mark.parametrize(
    ("stored", "weights", "dtype"),
    [
        ("fp4", None, torch.bfloat16), ("fp4", None, torch.float32), ("fp4", "int8", torch.bfloat16),
        ("fp8", None, torch.bfloat16), ("bf16", "fp4", torch.float32), ("bf16", None, torch.bfloat16),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_logits_are_those_of_the_whole_model(folders, stored, weights, dtype):
    """Prompt and steps, fused and by layers; caches of one expert, of a few, and of all."""
    theirs = whole(folders[stored], weights or stored, dtype)
    everything, steps = theirs(TOKENS), decode(theirs, 34)
    for experts in (1, TOP + 1, 1000):
        model = streamed(folders[stored], experts, weights, dtype)
        assert torch.equal(model(TOKENS), everything), experts
        assert torch.equal(decode(model, 34), steps), experts
        stats = model.expert_cache.stats()
        assert stats.misses and stats.bytes_read and stats.resident_bytes <= stats.capacity_bytes
        assert stats.slots == min(experts, ALL) and stats.experts == ALL
        assert (stats.misses + stats.prefetches <= ALL) == (experts == 1000)  # each read once, or some again


@torch.inference_mode()
def test_every_way_to_run_a_model_is_the_same(folders):
    mine, theirs = streamed(folders["fp4"], 3), whole(folders["fp4"], "fp4")
    streams = [model.forward_streams(TOKENS) for model in (mine, theirs)]
    assert torch.equal(streams[0], streams[1])
    for weights in (exactness.weights_of(model) for model in (mine, theirs)):
        assert ("streamed from disk" in weights) == ("experts fp4" in weights)
    assert exactness.chosen_operations(mine)["streamed_experts"] in ("native", "reference")
    drafts = [model.mtp_streams(streams[0][:, :-1], TOKENS[:, 1:]) for model in (mine, theirs)]
    assert torch.equal(drafts[0], drafts[1])
    states = [[model.new_state() for _ in range(3)] for model in (mine, theirs)]
    for sizes in ([20, 1, 3], [1, 1, 1], [2, 30, 1]):
        out = []
        for model, own in zip((mine, theirs), states, strict=True):
            parts = [Segment(state, TOKENS[0, :size]) for state, size in zip(own, sizes, strict=True)]
            out.append(model.next_scores(parts).logits)
        assert torch.equal(out[0], out[1])
    with registry.only("reference"):
        plain = [model(TOKENS) for model in (mine, theirs)]
        assert torch.equal(plain[0], plain[1])


@torch.inference_mode()
def test_hash_layers_are_read_ahead_and_repeats_are_hits(folders):
    model = streamed(folders["fp4"], 1000)
    state = model.new_state()
    token = TOKENS[:1, :1]
    model(token, state=state)
    first: CacheStats = model.expert_cache.stats()
    assert first.prefetches == first.prefetch_hits == TOP  # the one hash layer
    assert first.misses == TOP * (CONFIG.num_hidden_layers - 1) and first.hits == 0
    model(token, state=model.new_state())
    second = model.expert_cache.stats()
    assert second.hits == TOP * CONFIG.num_hidden_layers
    assert (second.misses, second.prefetches, second.bytes_read) == (first.misses, first.prefetches, first.bytes_read)
    assert first.hit_rate == TOP / (TOP * CONFIG.num_hidden_layers) and second.hit_rate > first.hit_rate


@torch.inference_mode()
def test_a_long_prompt_does_not_push_everything_out(folders):
    """Half of the experts fit: a prompt that wants all of them finds what was there at each pass."""
    model = streamed(folders["fp4"], COUNT)
    for _ in range(2):
        model(TOKENS)
    before = model.expert_cache.stats()
    model(TOKENS)
    after = model.expert_cache.stats()
    wanted = COUNT * CONFIG.num_hidden_layers
    found = after.hits + after.prefetch_hits - before.hits - before.prefetch_hits
    assert found >= wanted // 6  # plain LRU would find none


@torch.inference_mode()
def test_several_threads_share_a_cache(folders):
    model, theirs = streamed(folders["fp4"], 2), whole(folders["fp4"], "fp4")
    wanted, wrong = decode(theirs, 20), []

    def run() -> None:
        with torch.inference_mode():
            if not torch.equal(decode(model, 20), wanted):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_budget_that_is_too_small_says_what_is_needed(folders, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"needs at least ([\d,]+)") as caught:
        patch.setattr(checkpoint.CheckpointFiles, "read", None)  # it must be known before a weight is read
        patch.setattr(checkpoint.CheckpointFiles, "copy", None)
        checkpoint.load_official(folders["fp4"], memory=1 << 20)
    found = re.search(r"needs at least ([\d,]+): ([\d,]+) of dense", str(caught.value))
    assert found is not None
    needed, dense = (int(text.replace(",", "")) for text in found.groups())
    model = checkpoint.load_official(folders["fp4"], memory=needed + (64 << 20))  # the process may have grown
    assert dense == dense_bytes(model) and model.embed.weight.dtype == torch.bfloat16
    assert model.expert_cache.stats().slots >= TOP
    with pytest.raises(ConfigError, match="memory is 'lots'"):
        checkpoint.load_official(folders["fp4"], memory="lots")
    with pytest.raises(ConfigError, match="holds no expert"):
        checkpoint.load_official(folders["fp4"], memory=MemoryBudget(cache=10))


def test_what_cannot_be_streamed_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="on a CPU from files that hold all"):
        checkpoint.load_official(folders["fp4"], memory="4GiB", strict=False)
    checkpoint.save_transformers(build(CONFIG), tmp_path / "hf")
    with pytest.raises(ConfigError, match="fused"):
        checkpoint.load_model(tmp_path / "hf", memory="16GiB", weights="fp4")
    checkpoint.save_official(build(CONFIG), tmp_path / "fp32")
    with pytest.raises(ConfigError, match="dtypes in these files are F32"):
        checkpoint.load_official(tmp_path / "fp32", memory="16GiB")
    with pytest.raises(ConfigError, match="cannot be saved"):
        checkpoint.save_official(streamed(folders["fp4"], 4), tmp_path / "again")


def test_files_that_shrink_while_they_are_used_are_reported_and_read_again_later(folders, tmp_path):
    checkpoint.save_official(build(CONFIG), tmp_path, experts="fp4")
    model, theirs = streamed(tmp_path, 4), whole(folders["fp4"], "fp4")
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    with torch.inference_mode():
        with path.open("r+b") as file:
            file.truncate(1000)
        for call in (lambda: model(TOKENS), lambda: decode(model, 1)):
            with pytest.raises(CheckpointError, match="became shorter"):
                call()
        path.write_bytes(content)
        assert torch.equal(model(TOKENS), theirs(TOKENS))
        assert torch.equal(decode(model, 1), decode(theirs, 1))


@pytest.mark.parametrize("refuses_at", ["open", "read"])
@torch.inference_mode()
def test_file_systems_without_direct_input(folders, monkeypatch, refuses_at):
    plain_open, plain_read = direct_io.os.open, direct_io.os.preadv
    direct = getattr(direct_io.os, "O_DIRECT", 0)
    handles = set()

    def opened(path, flags):
        if flags & direct and refuses_at == "open":
            raise OSError(22, "Invalid argument")
        handle = plain_open(path, flags)
        handles.discard(handle)
        if flags & direct:
            handles.add(handle)
        return handle

    def read(handle, buffers, at):
        if handle in handles:
            raise OSError(22, "Invalid argument")
        return plain_read(handle, [buffer[:5000] for buffer in buffers], at)  # in small pieces, too

    monkeypatch.setattr(direct_io.os, "open", opened)
    monkeypatch.setattr(direct_io.os, "preadv", read)
    model = streamed(folders["fp4"], 4)
    assert torch.equal(model(TOKENS), whole(folders["fp4"], "fp4")(TOKENS))


def test_threads_and_files_of_a_cache_end_with_it(folders):
    gc.collect()
    model = streamed(folders["fp4"], 4)
    with torch.inference_mode():
        decode(model, 38)
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("expert reader")]
    assert len(mine) >= 4
    kept = weakref.ref(model.expert_cache)
    gc.disable()  # gigabytes must not wait for it
    try:
        del model
        end = time.monotonic() + 5
        while kept() is not None and time.monotonic() < end:  # a thread may be reading yet
            time.sleep(0.01)
        assert kept() is None
    finally:
        gc.enable()
    gc.collect()  # caches of other tests
    for thread in mine:
        thread.join(5)
    assert not any(thread.is_alive() for thread in mine)


@pytest.mark.parametrize("speculate", [False, True])
def test_an_engine_answers_the_same_and_counts_it(speculate: bool):
    prompts, params = ["def mean(values):\n", "What is 8 + 5?"], SamplingParams(temperature=0.0, max_tokens=12)
    answers = []
    for options in ({"memory": MemoryBudget(cache=200_000)}, {"weights": "bf16", "dtype": torch.bfloat16}):
        model, tokenizer = checkpoint.load("minke", **options)
        with Engine(model, tokenizer, speculate=speculate) as engine:
            answers.append([one.ids for one in engine.generate(prompts, params)])
            text = metrics({"minke": ServedModel("minke", engine)})
        assert ("rorqual_experts_misses_total" in text) == ("memory" in options)
    assert answers[0] == answers[1]
