"""What is promised about the bits of a request's output, from what computes it, and what was done for it.

`bitwise` means: the same weights, prompt and sampling give the same logits and tokens on this machine whatever requests
share its steps, however its prompt is cut, whatever the prefix cache brings, with drafts or without, on any number of
threads, before and after a restart. It holds where every operation on the way is one whose order of additions depends
on nothing but the token's own sequence: the C operations of inference. So it is read off the registry for tensors like
the model's, and off the model itself; where something else runs, `why` says what. `rorqual selftest` tries it out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from rorqual.engine.store.fingerprint import arithmetic
from rorqual.model import Transformer
from rorqual.model.packed_weights import packed
from rorqual.model.quantised import is_quantised
from rorqual.ops import native, registry
from rorqual.ops.hyper_connections import MOST_ITERS

if TYPE_CHECKING:
    from rorqual.engine.request import Request

Level = Literal["bitwise", "approximate", "unknown"]
Operations = Literal["native", "mixed", "reference", "unknown"]

TYPED = ("linear", "rms_norm", "norm_rope", "rope", "route", "index_scan")
"""Operations of inference on tensors in the model's dtype; `EXACT` are in fp32, `STREAMS` on the residual streams."""
EXACT = ("rope_table", "pool_rows")
STREAMS = ("hc_pre", "hc_post", "hc_head")
ENGRAM = ("sigmoid", "silu")

PACKED = ("packed_linear", "packed_experts")


@dataclass(frozen=True)
class Exactness:
    """The promise for one request, and what was done for it."""

    level: Level
    batch_invariant: bool
    chunk_invariant: bool
    thread_invariant: bool
    restart_invariant: bool
    cache: Literal["none", "exact", "approximate"]
    """What the prefix cache brought: nothing, or state that gives the bits of a fresh run, or not quite those."""
    speculation: Literal["none", "exact", "approximate"]
    """Whether drafts were checked for it, and whether checking them gives the bits of one token after the other."""
    index_search: Literal["exact", "grouped"]
    """`grouped`: beyond 22,527 tokens the indexer's entries are found by an approximation, so the model's definition
    would give other tokens, though what is promised here holds."""
    guard: dict[str, Any] | None
    """The retrieval guard that was on, and what it cost (`GuardUse`): tokens are then those of the guarded model, and
    what is promised here is promised of these. None: it was off."""
    operations: Operations
    kernels: str
    """The C library by its hash (of source, compiler and processor), or the version of torch: equal names promise equal
    bits on one machine only."""
    device: str
    dtype: str
    weights: str
    seed: int | None
    """With the same seed a sampled output is the same; None for greedy choice."""
    cached_tokens: int
    batched_with: int
    """Most other requests in one of its steps."""
    prompt_steps: int
    """Steps in which the prompt was read."""
    why: str | None
    """Why something is not promised."""

    def to_dict(self) -> dict[str, Any]:
        """For response metadata."""
        return asdict(self)


@dataclass(frozen=True)
class Arithmetic:
    """What a model computes with. `why` is None where every operation of inference keeps to one order."""

    operations: Operations
    kernels: str
    device: str
    dtype: str
    weights: str
    why: str | None
    index_search: Literal["exact", "grouped"] = "exact"


def examine(model: Any) -> Arithmetic:  # Any: a LanguageModel
    """What `model` would compute with now, on the calling thread."""
    if not isinstance(model, Transformer):
        name = type(model).__name__
        strange = f"{name} is not a rorqual.Transformer, so nothing is known of its arithmetic."
        return Arithmetic("unknown", "unknown", "unknown", "unknown", "unknown", strange)
    with torch.inference_mode():
        found = chosen_operations(model)
        why = _why_not(model, found)
    native_names = [name for name, by in found.items() if by == "native"]
    operations: Operations = "native" if len(native_names) == len(found) else "mixed" if native_names else "reference"
    return Arithmetic(
        operations, arithmetic(), str(model.reference.device), _short(model.streams_dtype), weights_of(model), why,
        "grouped" if model.cfg.index_search == "grouped" and found["index_scan"] == "native" else "exact",
    )  # fmt: skip


def chosen_operations(model: Transformer) -> dict[str, str]:
    """The implementation that the registry picks for each operation of inference on tensors like the model's."""
    cfg, like, dtype = model.cfg, model.reference, model.streams_dtype
    typed = like.new_empty(1, cfg.hidden_size, dtype=dtype)
    exact = like.new_empty(1, cfg.head_dim, dtype=torch.float32)
    streams = like.new_empty(1, 1, cfg.hc_mult, cfg.hidden_size, dtype=dtype)
    probes = [(name, typed) for name in TYPED]
    probes += [(name, exact) for name in (*EXACT, *(ENGRAM if cfg.engram is not None else ()))]
    if next(packed(model), None) is not None:
        probes += [(name, typed) for name in PACKED]
    if model.expert_cache is not None:
        probes.append(("streamed_experts", typed))
    probes += [(name, streams) for name in STREAMS if cfg.residual == "mhc"]
    return {name: registry.chosen(name, probe) for name, probe in probes}


def weights_of(model: Transformer) -> str:
    """How the weights are kept: their dtype, and what of them is packed, or rounded by `quantise`."""
    formats = sorted({weight.format for _, weight in packed(model)})
    more = f", packed {' and '.join(formats)}" if formats else ""
    if model.expert_cache is not None:
        more += f", experts {model.expert_cache.reader.kind} streamed from disk"
    return _short(model.reference.dtype) + more + (" rounded to the stored formats" if is_quantised(model) else "")


def _why_not(model: Transformer, found: dict[str, str]) -> str | None:
    device, dtype, cfg = model.reference.device, model.streams_dtype, model.cfg
    order = "in an order that may depend on the number of rows in a step"
    if not registry.allows("native"):
        return f"RORQUAL_OPS switches the C operations off, and torch's products add up {order}."
    if device.type != "cpu":
        return f"The model is on {device}, where products and sums are the device library's and add up {order}."
    if dtype not in (torch.float32, torch.bfloat16):
        return f"The model computes in {_short(dtype)}, for which there are no C operations; torch's add up {order}."
    if native.load() is None:
        return f"The C operations could not be built (rorqual doctor says why), and torch's products add up {order}."
    slow = [name for name, by in found.items() if by != "native"]
    if slow:
        return f"Torch code runs {', '.join(slow)} for this model's shapes, and it adds up {order}."
    if cfg.residual == "hc" or (cfg.residual == "mhc" and cfg.hc_sinkhorn_iters > MOST_ITERS):
        return f"Torch code mixes the residual streams of this model, and its products add up {order}."
    return None


def describe(facts: Arithmetic, request: Request) -> Exactness:
    """The promise of `facts` for one request, with what was done for it so far."""
    holds = facts.why is None
    cached = request.usage.cached_tokens
    is_known = facts.operations != "unknown"
    kept: Literal["exact", "approximate"] = "exact" if holds else "approximate"
    return Exactness(
        level="bitwise" if holds else "approximate" if is_known else "unknown",
        batch_invariant=holds,
        chunk_invariant=holds,
        thread_invariant=holds,
        restart_invariant=holds,
        cache=kept if cached else "none",
        speculation=kept if request.drafted else "none",
        index_search=facts.index_search,
        guard=None if request.guard is None else request.guard.to_dict(),
        operations=facts.operations,
        kernels=facts.kernels,
        device=facts.device,
        dtype=facts.dtype,
        weights=facts.weights,
        seed=None if request.params.temperature == 0 else request.seed,
        cached_tokens=cached,
        batched_with=request.batched_with,
        prompt_steps=request.prompt_steps,
        why=facts.why,
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).split(".")[-1])
