"""Decoding by the fused step: where a model's weights and its sequences' memories lie, as `ops/native/decode_step.c`
reads them.

The layer code is the reference, and bit by bit the same; it runs whatever the step does not know: Engram memories,
other residual paths, rounded weights or inputs, experts elsewhere, other devices and dtypes, hooks, gradients.

L layers, R rows (sequences), N streams, D hidden.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rorqual.model.block import Block
from rorqual.model.cache_format import packs_keys, row_of
from rorqual.model.compressor import Compressor
from rorqual.model.decode_memory import Addresses, Memory
from rorqual.model.expert_fetch import Fetcher, expect_experts
from rorqual.model.guard import forced_columns
from rorqual.model.index_groups import bring_up_to_date
from rorqual.model.moe import MoE
from rorqual.model.mtp import MTPModule
from rorqual.model.scores import Scores
from rorqual.ops.hadamard import scaled_hadamard
from rorqual.ops.hyper_connections import MOST_ITERS, MOST_STREAMS
from rorqual.ops.index_groups import BUDGET
from rorqual.ops.native import infers
from rorqual.ops.native.decode_step import Drafter, Network, columns
from rorqual.ops.packed_weight import FORMATS, PackedWeight

if TYPE_CHECKING:
    from rorqual.model.segments import Segment
    from rorqual.model.state import State
    from rorqual.model.transformer import Transformer


MOST_TOKENS = 16
"""Tokens of one sequence that run in one step with those of others: drafts to verify, and ends of prompts."""
PIECE = 1024
"""Tokens of a longer prompt that run in one step: enough for weights to be turned once, few enough for the cache."""


class Plan(Addresses):
    """The tables of one model. `is_usable` is False where only the layer code can run it."""

    def __init__(self, model: "Transformer") -> None:
        self.signature = _signature(model)
        self.is_usable = _is_known(model)
        self.kept: list[Tensor] = []
        """What the addresses point at, kept alive."""
        if self.is_usable:
            self.fetcher = _fetcher(model)
            shape = _shape(model, 0 if self.fetcher is None else self.fetcher.address)
            numbers, embedding = _numbers(model), model.embed.weight.detach()
            blocks = [layer for layer in model.layers if isinstance(layer, Block)]
            rows = [self._layer(layer, model.reference.dtype) for layer in blocks]
            self.routed = [block.ffn for block in blocks]
            self._address(embedding, model.reference.dtype)
            if self.is_usable:
                head = self._head(model, model)
                self.network = Network(embedding, shape, numbers, torch.tensor(rows, dtype=torch.int64), head)
        self.is_grouped = model.cfg.index_search == "grouped"
        self.ratios = {spec.compress_ratio for spec in model.cfg.layers if spec.compress_ratio}
        self._drafters: dict[torch.dtype, tuple[int, Drafter | None]] = {}

    def holds_for(self, model: "Transformer") -> bool:
        """Whether weights and modules are still those that this was made from."""
        return self.signature == _signature(model)

    def _layer(self, block: Block, dtype: torch.dtype, *, may_copy: bool = False) -> list[int]:
        attn, ffn = block.attn, block.ffn
        exact: dict[str, Tensor | None] = {
            "frequencies": attn.frequencies, "sink": attn.attn_sink, "bias": _bias(ffn),
            "hc_attn_fn": block.hc_attn_fn, "hc_attn_base": block.hc_attn_base, "hc_attn_scale": block.hc_attn_scale,
            "hc_ffn_fn": block.hc_ffn_fn, "hc_ffn_base": block.hc_ffn_base, "hc_ffn_scale": block.hc_ffn_scale,
        }  # fmt: skip
        typed: dict[str, Tensor | PackedWeight] = {
            "attn_norm": block.attn_norm.weight, "ffn_norm": block.ffn_norm.weight, "wq_a": attn.wq_a.weight,
            "q_norm": attn.q_norm.weight, "wq_b": attn.wq_b.weight, "wkv": attn.wkv.weight,
            "kv_norm": attn.kv_norm.weight, "wo_a": attn.wo_a.weight, "wo_b": attn.wo_b.weight,
            "gate": ffn.gate.weight,
            "shared_w1": ffn.shared_experts.w1.weight, "shared_w2": ffn.shared_experts.w2.weight,
            "shared_w3": ffn.shared_experts.w3.weight,
        }  # fmt: skip
        if ffn.experts.streamed is None:
            typed |= {"w1": ffn.experts.w1, "w2": ffn.experts.w2, "w3": ffn.experts.w3}
        if attn.compressor is not None:
            _add_compressor("entry", attn.compressor, exact, typed)
        if attn.indexer is not None:
            _add_compressor("index", attn.indexer.compressor, exact, typed)
            typed["index_wq_b"], typed["index_weights"] = attn.indexer.wq_b.weight, attn.indexer.weights_proj.weight
            typed["hadamard"] = scaled_hadamard(attn.indexer.width, attn.frequencies.device, dtype)
        values = {"ratio": block.spec.compress_ratio, "overlap": int(block.spec.overlap)}
        values["tid2eid"] = self._address(ffn.gate.tid2eid, torch.int64) if block.spec.hash_routed else 0
        values |= {name: self._address(tensor, torch.float32) for name, tensor in exact.items()}
        for name, weight in typed.items():
            if isinstance(weight, PackedWeight):
                values[name] = self._address(weight.codes, torch.uint8)
                scale = weight.scale
                values[f"{name}_scale"] = 0 if scale is None else self._address(scale, scale.dtype)
            else:
                values[name] = self._address(weight, dtype, may_copy=may_copy)
        return [values.get(name, 0) for name in columns("Layer")]

    def _head(
        self, model: "Transformer", part: "Transformer | MTPModule", copied: torch.dtype | None = None
    ) -> Tensor | None:
        """HC head and norm of the trunk or of an MTP module, and the output head, as they are or `copied` to another
        dtype; None: the layer code has to do it.
        """
        dtype = copied or model.reference.dtype
        exact = {"head_fn": part.hc_head_fn, "head_base": part.hc_head_base, "head_scale": part.hc_head_scale}
        typed = {"head_norm": part.norm.weight, "head_weight": model.head.weight}
        values = {name: self._address(tensor, torch.float32) for name, tensor in exact.items()}
        values |= {name: self._address(tensor, dtype, may_copy=copied is not None) for name, tensor in typed.items()}
        is_usable, self.is_usable = self.is_usable, True  # the layers can be run in any case
        return torch.tensor([values[name] for name in columns("Head")]) if is_usable else None

    def drafter(self, model: "Transformer", dtype: torch.dtype) -> "Drafter | None":
        """The first MTP module's tables, weights in `dtype`: copies unless it is the model's; None: layer code drafts.

        Copies are made anew when weights have changed in place.
        """
        module = model.mtp[0] if len(model.mtp) else None
        if not self.is_usable or not isinstance(module, MTPModule):
            return None
        version = 0
        if dtype is not model.reference.dtype:
            weights = [*module.parameters(), model.embed.weight, model.head.weight]
            version = sum(0 if weight.is_inference() else weight._version for weight in weights)
        found = self._drafters.get(dtype)
        if found is None or found[0] != version:
            found = self._drafters[dtype] = version, self._new_drafter(model, module, dtype)
        return found[1]

    def _new_drafter(self, model: "Transformer", module: MTPModule, dtype: torch.dtype) -> "Drafter | None":
        is_packed = any(_format(weight) for weight in (module.e_proj.weight, module.attn.wq_a.weight))
        if is_packed or _expert_format(module.ffn):
            return None  # the layer code drafts
        others, self.kept = self.kept, []
        head = self._head(model, module, dtype)
        typed = {
            "embed": model.embed.weight, "e_proj": module.e_proj.weight, "h_proj": module.h_proj.weight,
            "e_norm": module.enorm.weight, "h_norm": module.hnorm.weight,
        }  # fmt: skip
        values = {name: self._address(tensor, dtype, may_copy=True) for name, tensor in typed.items()}
        layer, shape = self._layer(module, dtype, may_copy=True), self.network.shape.clone()
        shape[columns("Shape").index("layers")] = 1
        tables = torch.tensor(layer), torch.tensor([values[name] for name in columns("Draft")])
        is_usable, self.is_usable = self.is_usable, True  # the trunk's layers can be run in any case
        mine, self.kept = self.kept, others
        if not is_usable or head is None:
            return None
        return Drafter(dtype, shape, self.network.numbers, *tables, head, mine)

    def _address(self, tensor: Tensor | None, dtype: torch.dtype, *, may_copy: bool = False) -> int:
        if tensor is None:
            return 0
        if may_copy and tensor.dtype.is_floating_point:
            tensor = tensor.detach().to(dtype)
        if tensor.dtype is not dtype or not tensor.is_contiguous():
            self.is_usable = False
        self.kept.append(tensor.detach())
        return tensor.data_ptr()


def _bias(ffn: MoE) -> Tensor | None:
    return None if ffn.gate.hash_routed else ffn.gate.bias


def _add_compressor(
    name: str, compressor: Compressor, exact: dict[str, Tensor | None], typed: dict[str, Tensor | PackedWeight]
) -> None:
    exact[f"{name}_ape"], typed[f"{name}_norm"] = compressor.ape, compressor.norm.weight
    typed[f"{name}_wkv"], typed[f"{name}_wgate"] = compressor.wkv.weight, compressor.wgate.weight


def _shape(model: "Transformer", fetch: int) -> Tensor:
    cfg, dtype = model.cfg, model.reference.dtype
    first = next(layer for layer in model.layers if isinstance(layer, Block))
    packed = {part: row_of(cfg, part, dtype) for part in ("entries", "index_keys")}
    row_bytes = {part: width if kind == torch.uint8 else 0 for part, (width, kind) in packed.items()}
    values = {
        "layers": cfg.num_hidden_layers, "hidden": cfg.hidden_size, "streams": cfg.hc_mult,
        "heads": cfg.num_attention_heads, "width": cfg.head_dim, "rope": cfg.qk_rope_head_dim,
        "query_rank": cfg.q_lora_rank, "groups": cfg.o_groups, "output_rank": cfg.o_lora_rank,
        "window": cfg.sliding_window, "experts": cfg.n_routed_experts, "active": cfg.num_experts_per_tok,
        "expert_width": cfg.moe_intermediate_size, "index_heads": cfg.index_n_heads,
        "index_width": cfg.index_head_dim, "top_k": cfg.index_topk, "iters": cfg.hc_sinkhorn_iters,
        "entry_bytes": row_bytes["entries"], "key_bytes": row_bytes["index_keys"],
        "rounds_kv": int(cfg.activation_rounding != "none"),
        "projections": _format(first.attn.wq_a.weight), "expert_format": _expert_format(first.ffn),
        "rounds_keys": int(cfg.activation_rounding != "none" or packs_keys(cfg)), "fetch": fetch,
        "group_budget": BUDGET if cfg.index_search == "grouped" else 0,
    }  # fmt: skip
    return torch.tensor([values[name] for name in columns("Shape")], dtype=torch.int64)


def _format(weight: Tensor | PackedWeight) -> int:
    """0 of a parameter, 1 + the format of a packed weight; all of a model's projections, and all experts, are alike."""
    return 1 + FORMATS.index(weight.format) if isinstance(weight, PackedWeight) else 0


def _expert_format(ffn: MoE) -> int:
    streamed = ffn.experts.streamed
    return _format(ffn.experts.w1) if streamed is None else 1 + FORMATS.index(streamed.format)


def _fetcher(model: "Transformer") -> Fetcher | None:
    """What brings in streamed experts; None where all are in memory."""
    sources = [layer.ffn.experts.streamed for layer in model.layers if isinstance(layer, Block)]
    return Fetcher([source for source in sources if source is not None]) if sources[0] is not None else None


def _numbers(model: "Transformer") -> Tensor:
    cfg = model.cfg
    index_scale = cfg.index_head_dim**-0.5 * cfg.index_n_heads**-0.5
    values = {
        "norm_eps": cfg.rms_norm_eps, "hc_eps": cfg.hc_eps, "scale": cfg.head_dim**-0.5, "index_scale": index_scale,
        "route_scale": cfg.routed_scaling_factor, "limit": cfg.swiglu_limit,
    }  # fmt: skip
    return torch.tensor([values[name] for name in columns("Number")], dtype=torch.float32)


def _is_known(model: "Transformer") -> bool:
    """Whether the step computes what this model's layer code would."""
    cfg, dtype = model.cfg, model.reference.dtype
    if not (model.is_first and model.is_last and model.compute_dtype in (None, dtype)):
        return False
    if cfg.residual != "mhc" or cfg.engram is not None or cfg.hc_mult > MOST_STREAMS:
        return False
    if cfg.hc_sinkhorn_iters > MOST_ITERS or cfg.hc_mult * cfg.hidden_size % 2 or cfg.index_head_dim % 2:
        return False
    return all(_is_plain(module) for module in model.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says: no hooks, no rounding, no adapter, nothing elsewhere."""
    if module._forward_hooks or module._forward_pre_hooks or {"stored_as", "adapter"} & module.__dict__.keys():
        return False
    if isinstance(module, MoE):
        return module.exchange is None and not module.round_inputs
    return True


def _signature(model: "Transformer") -> list[Any]:
    """Changes with whatever would make a plan wrong: weights that moved, modules that changed."""
    out: list[Any] = [
        model.compute_dtype,
        model.cfg.cache_format,
        model.cfg.index_search,
        model.cfg.activation_rounding,
    ]
    for module in model.modules():
        out.append((type(module), _is_plain(module)))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            out.append(None if tensor is None else (tensor.data_ptr(), tensor.dtype))
    return out


def _needs_layer_code(state: "State") -> bool:
    """Whether the fused step must not run this state's next token."""
    return state.is_replaying or (state.guard is not None and state.guard.rules.needs_layer_code)


def plan_of(model: "Transformer", states: Sequence["State"]) -> Plan | None:
    """The plan that runs the next token of these states, or None where the layer code must.

    Weights are looked over when a state comes for the first time: later they may change in place, not move.
    """
    if not infers(model.reference):
        return None
    plan: Plan | None = model.__dict__.get("decode_plan")
    is_new = plan is None
    for state in states:
        if _needs_layer_code(state):
            return None
        is_new = is_new or state.decoding is None or state.decoding.plan is not plan
    if plan is None or (is_new and not plan.holds_for(model)):
        plan = model.__dict__["decode_plan"] = Plan(model)
    return plan if plan.is_usable else None


def forget(model: nn.Module) -> None:
    """Make the plan anew at the next step; for changes of modules or weights that move."""
    for module in model.modules():
        module.__dict__.pop("decode_plan", None)


def step_rows(model: "Transformer", tokens: Tensor, state: "State", *, scored: bool) -> Scores | None:
    """One token for every row of a state by the fused step: ids [B, 1] -> streams [B, 1, N, D] and, if they are to be
    `scored`, what follows them; None where the layer code must run. Raises as `Transformer.forward_streams`.
    """
    if tokens.shape != (state.batch_size, 1) or tokens.dtype is not torch.int64 or state.model is not model:
        return None
    plan = plan_of(model, [state])
    if plan is None or (scored and plan.network.head is None):
        return None
    model.check_ids(tokens)
    state.check(1)
    wanted = range(state.batch_size) if scored else ()
    return _decode(plan, tokens.flatten().tolist(), [state], [1], wanted, model.cfg.vocab_size, is_batch=True)


def step_scored(
    model: "Transformer", segments: Sequence["Segment"], wanted: Sequence[int], choices: int
) -> Scores | None:
    """Checked segments of a few tokens each by the fused step, with what follows the rows in `wanted`; None where the
    layer code must run, for some of them or for the output head.
    """
    counts = [len(segment.tokens) for segment in segments]
    if max(counts) > MOST_TOKENS:
        return None
    states = [segment.state for segment in segments]
    plan = plan_of(model, states)
    if plan is None or plan.network.head is None:
        return None
    ids = [one for segment in segments for one in segment.ids]
    return _decode(plan, ids, states, counts, wanted, choices)


def step(
    model: "Transformer",
    segments: Sequence["Segment"],
    by_layers: Callable[["Transformer", Sequence["Segment"]], Tensor],
) -> Tensor:
    """Checked segments' streams [1, T, N, D] by the fused step, those of a few tokens together, longer ones alone and
    in pieces; by the layer code where it must run.
    """
    fits = [not _needs_layer_code(segment.state) for segment in segments]
    known = [segment for segment, is_known in zip(segments, fits, strict=True) if is_known]
    plan = plan_of(model, [segment.state for segment in known]) if known else None
    if plan is None:
        return by_layers(model, segments)
    short = [segment for segment in known if len(segment.tokens) <= MOST_TOKENS]
    ids = [one for segment in short for one in segment.ids]
    counts = [len(segment.tokens) for segment in short]
    parts: dict[int, Tensor] = {}
    if short:
        decoded = _decode(plan, ids, [segment.state for segment in short], counts).streams.split(counts, 1)
        parts |= {id(segment): part for segment, part in zip(short, decoded, strict=True)}
    for segment in known:
        if len(segment.tokens) > MOST_TOKENS:
            ids = segment.ids
            streams = plan.network.room(1, len(ids))
            for at in range(0, len(ids), PIECE):
                piece = ids[at : at + PIECE]
                _decode(plan, piece, [segment.state], [len(piece)], out=streams[:, at : at + PIECE])
            parts[id(segment)] = streams
    rest = [segment for segment in segments if id(segment) not in parts]
    if rest:
        read = by_layers(model, rest).split([len(segment.tokens) for segment in rest], 1)
        parts |= {id(segment): part for segment, part in zip(rest, read, strict=True)}
    found = [parts[id(segment)] for segment in segments]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _decode(
    plan: Plan, ids: Sequence[int], states: Sequence["State"], counts: Sequence[int], wanted: Sequence[int] = (),
    choices: int = 0, *, is_batch: bool = False, out: Tensor | None = None,
) -> Scores:  # fmt: skip
    """The next `counts` tokens of every row of checked states, in order, and what follows the rows in `wanted`.

    A count beyond 1 is for a state of one row. is_batch: results with the rows in the first dimension. out: where the
    streams are to lie.
    """
    positions: list[int] = []
    first: list[int] = []
    tables: list[int] = []
    memories: list[int] = []
    shown = [
        state.shown(ids[at : at + count])
        for state, at, count in zip(states, accumulate(counts, initial=0), counts, strict=False)
    ]
    for state, count in zip(states, counts, strict=True):
        state.interrupted = True
        memory = _memory(state, plan, count)
        table = 0 if state.table is None else state.table.address
        for length, address in zip(state.lengths, memory.addresses, strict=True):
            first += [len(positions)] * count
            positions += range(length, length + count)
            tables += [table] * count
            memories += [address] * count
    places = [*ids, *positions, *first, *tables, *memories, *forced_columns(shown, counts, len(ids))]
    if plan.fetcher is not None:
        expect_experts(plan.routed, ids)
        plan.fetcher.begin()
    scores = Scores(*plan.network.step(places, len(ids), wanted, choices, is_batch=is_batch, out=out))
    if plan.fetcher is not None:
        plan.fetcher.end()
    at = 0
    for state, count in zip(states, counts, strict=True):
        for part in state.decoding.paged:
            part.length = max((state.lengths[0] + count) // part.ratio, part.frozen)
        mine = count * len(state.lengths)
        state.advance_each(ids[at : at + mine], count)
        at += mine
    return scores


def _memory(state: "State", plan: Plan, count: int) -> Memory:
    """The state's table, with room for the entries that its next `count` tokens complete."""
    longest = max(state.lengths) + count
    if state.table is None and any(longest % ratio < count for ratio in plan.ratios):
        for layer, spec in zip(state.layers, state.model.cfg.layers, strict=True):
            if spec.compress_ratio:
                layer.make_room(longest // spec.compress_ratio)
    if plan.is_grouped:
        bring_up_to_date(state)
    if state.decoding is None or not state.decoding.holds_for(state, plan):
        state.decoding = Memory(state, plan)
    memory: Memory = state.decoding
    return memory
