"""The network: embedding, layers over n residual streams, HC head, final norm, output head, MTP.

Source: V4 report section 2; numerics and order as in the checkpoint's inference code.

B batch, S tokens, N streams, D hidden, V vocabulary.
"""

import operator
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.errors import CacheError, RequestError
from rorqual.model import decode
from rorqual.model.block import Block, RunBlock, Runner
from rorqual.model.compressor import cover
from rorqual.model.context import Context, LayoutPart, part_bounds
from rorqual.model.engram import Engram
from rorqual.model.expert_fetch import expect_experts
from rorqual.model.hyper_connections import hc_head, hc_head_parameters
from rorqual.model.init import init_weights
from rorqual.model.layout import Layout
from rorqual.model.linear import RMSNorm
from rorqual.model.mtp import MTPModule
from rorqual.model.pages import PagePool
from rorqual.model.quantised import round_inputs
from rorqual.model.scores import Scores, best_of, check_wanted
from rorqual.model.segments import Segment, check_segments, flat_step
from rorqual.model.state import LayerState, State, recalls, restore
from rorqual.model.trace import Trace
from rorqual.ops.linear import linear_exact
from rorqual.ops.rope import rope_table

FP32_NAMES = re.compile(r"(hc_\w+|attn_sink|ape|gate\.bias|frequencies)$")
"""Tensors that stay fp32 whatever the model's dtype, as in the released checkpoints."""


class Embedding(nn.Module):
    """A [V, D] table: input rows, or the weight of the output head."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))


class Transformer(nn.Module):
    """A DeepSeek-V4 network. Parameter names are the official checkpoint's, routed experts stacked per layer.

    `seed` decides the initial weights; on the meta device, or with None, none are
    drawn (None: a loader fills them).
    """

    context: Context | None = None
    """Where rows are cut into parts: the processes that hold them. Without a state, calls then take whole rows and
    compute this process's part of each (`own`)."""
    runner: Runner | None = None
    """What runs the layers when gradients are wanted (activation checkpointing); None: one after the other."""
    is_first: bool = True
    """Whether this holds the first layers: False on later pipeline stages, which take `streams` instead of tokens."""
    is_last: bool = True
    """Whether this holds the last layers, HC head, norm, output head and MTP: False on earlier pipeline stages."""
    elsewhere: frozenset[str] = frozenset()
    """Parameters and buffers of the network that other pipeline stages hold."""

    expert_cache: Any = None
    """What streamed experts are read through (`checkpoint.ExpertCache`): its `stats()` say how that goes."""

    compute_dtype: torch.dtype | None = None
    """Precision of activations and matrix products where it differs from the weights': bf16 over fp32 weights in
    training. What V4 keeps in fp32 (mHC coefficients, compressors, router scores, softmaxes, sums) stays fp32."""

    def __init__(self, cfg: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, spec, f"layers.{spec.index}") for spec in cfg.layers)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.head = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = hc_head_parameters(cfg)
        self.mtp = nn.ModuleList(MTPModule(cfg, spec, f"mtp.{j}") for j, spec in enumerate(cfg.mtp_layers))
        if seed is not None and self.embed.weight.device.type != "meta":
            init_weights(self, seed)
        if cfg.activation_rounding == "v4-inputs":
            round_inputs(self)

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        segment_ids: Tensor | None = None,
        state: State | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Logits fp32 [B, S, V] of token ids int64 [B, S].

        `lengths`: valid tokens per row, the rest is right padding (logits there mean nothing). `segment_ids` [B, S]:
        packed documents that do not see each other. `state`: earlier tokens take part and these are added to it; any
        way of cutting a sequence into calls gives the logits of one full pass. `trace`: what to record (see `Trace`).
        Raises RequestError for ids outside the vocabulary or shapes that do not fit, CacheError for a foreign state.
        """
        if state is not None and lengths is None and segment_ids is None and trace is None:
            decoded = decode.step_rows(self, tokens, state, scored=True)
            if decoded is not None:
                return decoded.logits
        return self.logits(
            self.final_hidden(
                self.forward_streams(tokens, lengths=lengths, segment_ids=segment_ids, state=state, trace=trace)
            )
        )

    def forward_streams(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        segment_ids: Tensor | None = None,
        state: State | None = None,
        trace: Trace | None = None,
        streams: Tensor | None = None,
    ) -> Tensor:
        """The streams after the last layer, [B, S, N, D]; arguments as in `forward`.

        `streams` takes the place of the embedding where this model holds only later layers (a pipeline stage).
        """
        if state is not None and segment_ids is not None:
            return self._packed_with_state(tokens, lengths, segment_ids, state, trace)
        if state is not None and lengths is None and trace is None and streams is None:
            decoded = decode.step_rows(self, tokens, state, scored=False)
            if decoded is not None:
                return decoded.streams
        layout = self._layout(tokens, lengths, segment_ids, state)
        if not layout.num_tokens:
            return self.reference.new_zeros(layout.batch_size, 0, self.cfg.hc_mult, self.cfg.hidden_size)
        if state is not None:
            state.begin(layout.num_tokens)
            if state.guard is not None:
                layout.shown = state.shown(tokens[0, : layout.lengths[0]].tolist())
        tokens = layout.own(tokens)
        streams = self.through(tokens, layout, None if state is None else state.layers, trace, streams)
        if state is not None:
            state.advance(tokens, layout)
        return streams

    def step(self, segments: Sequence[Segment]) -> Tensor:
        """The next tokens of several sequences at once: streams after the last layer, [1, T, N, D], T tokens in all.

        Segments stand one behind the other in the order given; each state has taken in its tokens afterwards. Every
        token's streams are those of its own sequence alone, but weights are read once for all.
        Raises RequestError for ids or segments that cannot be, CacheError for a foreign, batched or unusable state;
        then no state has changed.
        """
        self._check(segments)
        return decode.step(self, segments, flat_step)

    def next_scores(
        self,
        segments: Sequence[Segment],
        wanted: Sequence[int] | None = None,
        choices: int | None = None,
        *,
        trace: Trace | None = None,
    ) -> Scores:
        """As `step`, and the scores behind some of its tokens: the same numbers as `step`, `final_hidden` and `logits`
        give, in one go where that can be.

        wanted: places in the row of all segments' tokens; the last token of each segment unless given.
        choices: how many ids are scored, from 0; all unless given. trace: what to record of the row, which the layer
        code then runs. Raises as `step`.
        """
        self._check(segments)
        ends = [*accumulate(len(segment.tokens) for segment in segments)]
        wanted = [end - 1 for end in ends] if wanted is None else wanted
        choices = self.cfg.vocab_size if choices is None else choices
        check_wanted(wanted, ends[-1], choices, self.cfg.vocab_size)
        decoded = None if trace is not None else decode.step_scored(self, segments, wanted, choices)
        if decoded is not None:
            return decoded
        streams = decode.step(self, segments, flat_step) if trace is None else flat_step(self, segments, trace)
        hidden = self.final_hidden(streams if len(wanted) == streams.shape[1] else streams[:, wanted])
        logits = self.logits(hidden)[..., :choices]
        return Scores(streams, hidden, logits, best_of(logits))

    def cover(self, layer: int, begin: int, end: int, length: int) -> tuple[int, int]:
        """Entries [first, last) of `layer` that hold something of tokens [begin, end) of a text of `length` tokens.

        Raises: RequestError as `compressor.cover`.
        """
        return cover(self.cfg.layers[layer], begin, end, length)

    def _check(self, segments: Sequence[Segment]) -> None:
        check_segments(self, segments)
        for segment in segments:
            segment.state.check(len(segment.tokens))

    def through(
        self,
        tokens: Tensor,
        layout: Layout,
        memory: Sequence[LayerState] | Sequence[Sequence[LayerState]] | None,
        trace: Trace | None,
        streams: Tensor | None,
    ) -> Tensor:
        """Embedding (or `streams` in its place) and layers; `memory` is by layer, in a flat batch one a segment."""
        for i, module in self._memories():
            module.prefetch(tokens, layout, None if memory is None else recalls(memory[i]))
        if streams is None:
            streams = self._embed(tokens).unsqueeze(-2).expand(-1, -1, self.cfg.hc_mult, -1)
            streams = streams.contiguous()
        tables: dict[bool, Tensor] = {}

        def run(layer: Block, streams: Tensor, trace: Trace | None) -> Tensor:
            compressed = layer.spec.compress_ratio > 0
            if compressed not in tables:
                tables[compressed] = rope_table(layout.positions, layer.attn.frequencies)
            state = None if memory is None else memory[layer.spec.index]
            return layer(streams, tokens, layout, tables[compressed], state, trace)

        layers = [layer for layer in self.layers if isinstance(layer, Block)]
        expect_experts([layer.ffn for layer in layers], tokens)
        return self._run(layers, streams, run, None if memory is not None else self.runner, trace)

    def _memories(self) -> list[tuple[int, Engram]]:
        """The blocks with an Engram memory: index and memory."""
        blocks = [block for block in self.layers if isinstance(block, Block)]
        return [(block.spec.index, block.engram) for block in blocks if block.engram is not None]

    def announce(self, calls: Sequence[tuple[Tensor, Sequence[int] | None, Tensor | None]]) -> None:
        """Start fetching what the Engram memories will read in a training step: (tokens, lengths, segment_ids) of every
        call it will make. After the backward passes `collect` brings the gradients to the tables.
        """
        memories = [memory for _, memory in self._memories() if memory.is_announced]
        if memories:
            layouts = [self._layout(tokens, lengths, segments, None) for tokens, lengths, segments in calls]
            own = [(layout.own(tokens), layout) for (tokens, _, _), layout in zip(calls, layouts, strict=True)]
            for memory in memories:
                memory.announce(own)

    def collect(self) -> None:
        """End what `announce` began."""
        for _, memory in self._memories():
            if memory.is_announced:
                memory.collect()

    def _packed_with_state(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None,
        segment_ids: Tensor,
        state: State,
        trace: Trace | None,
    ) -> Tensor:
        """Packed rows fed through a state: where a document begins, its row starts afresh.

        Afterwards the state holds each row's last document, and the next call may continue it (same id) or not.
        """
        layout = self._layout(tokens, lengths, None, state)
        if segment_ids.shape != tokens.shape:
            raise RequestError(
                f"segment_ids has shape {tuple(segment_ids.shape)} for tokens {tuple(tokens.shape)}; they must agree.",
                param="segment_ids",
            )
        out = self.embed.weight.new_zeros(*tokens.shape, self.cfg.hc_mult, self.cfg.hidden_size)
        for row, count in enumerate(layout.lengths):
            mine = state.rows([row])
            begin = 0
            ids = segment_ids[row, :count].tolist()
            for end in range(1, count + 1):
                if end < count and ids[end] == ids[begin]:
                    continue
                if mine.segments[0] != ids[begin] and mine.lengths[0]:
                    mine.truncate(0)
                part = self.forward_streams(tokens[row : row + 1, begin:end], state=mine, trace=trace)
                out[row, begin:end] = part[0]
                mine.segments[0], begin = ids[begin], end
            state.put_row(row, mine)
        return out

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., D] of ids [...], in the precision of the activations."""
        x = F.embedding(tokens, self.embed.weight)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def final_hidden(self, streams: Tensor) -> Tensor:
        """HC head and final norm: [B, S, N, D] -> [B, S, D]."""
        return self.norm(hc_head(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.cfg))

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head in fp32: [..., D] -> [..., V]."""
        return linear_exact(hidden, self.head.weight)

    def mtp_streams(
        self,
        streams: Tensor,
        next_tokens: Tensor,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        segment_ids: Tensor | None = None,
        trace: Trace | None = None,
        depth: int = 0,
    ) -> Tensor:
        """MTP module `depth` on the streams of `forward_streams` [B, S, N, D] and token i + 1 of each row [B, S].

        `mtp_hidden` and `logits` then give the prediction of token i + 2. Raises RequestError without such a module.
        """
        module = self._mtp_module(depth)
        layout = self._layout(next_tokens, lengths, segment_ids, None)
        next_tokens = layout.own(next_tokens)
        if streams.shape[:2] != next_tokens.shape:
            raise RequestError(
                f"streams {tuple(streams.shape)} and next_tokens {tuple(next_tokens.shape)} disagree; give one next "
                "token per row and position."
            )
        table = rope_table(layout.positions, module.attn.frequencies)

        def run(layer: Block, streams: Tensor, trace: Trace | None) -> Tensor:
            return layer(streams, next_tokens, layout, table, None, trace)

        joined = module.join(streams, self._embed(next_tokens))
        return self._run([module], joined, run, self.runner, trace)

    @staticmethod
    def _run(
        layers: Sequence[Block], streams: Tensor, run: RunBlock, runner: Runner | None, trace: Trace | None
    ) -> Tensor:
        if runner is not None and torch.is_grad_enabled():
            return runner(layers, streams, run, trace)
        for layer in layers:
            streams = run(layer, streams, trace)
        return streams

    def _mtp_module(self, depth: int) -> MTPModule:
        if not 0 <= depth < len(self.mtp):
            raise RequestError(
                f"MTP module {depth} was asked for, but this model has {len(self.mtp)}. Load a checkpoint with mtp.* "
                "tensors (num_nextn_predict_layers), or do without."
            )
        module = self.mtp[depth]
        assert isinstance(module, MTPModule)
        return module

    def mtp_hidden(self, streams: Tensor, depth: int = 0) -> Tensor:
        """[B, S, N, D] -> [B, S, D], ready for `logits`. Raises RequestError without such a module."""
        return self._mtp_module(depth).hidden(streams)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Move and cast as nn.Module does, but never below fp32 what V4 keeps there.

        These are mHC coefficients, sinks, position biases, router biases and the rope frequencies.
        """
        named = [*self.named_parameters(), *self.named_buffers()]
        exact = {id(t) for name, t in named if FP32_NAMES.search(name)}

        def keep(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in exact and out.dtype.itemsize < 4 else out

        decode.forget(self)
        return super()._apply(keep, recurse)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter called `target`: under `quantised.quantise` too the one that is trained."""
        module, _, name = target.rpartition(".")
        owner = self.get_submodule(module)
        return super().get_parameter(target) if owner is self else owner.get_parameter(name)

    def new_state(self, batch_size: int = 1, rewind: int = 128, pool: PagePool | None = None) -> State:
        """An empty state for `batch_size` sequences that can be cut back `rewind` tokens exactly at any time.

        With a `pool` (one row then) entries and index keys lie in its pages, which forks share.
        """
        return State.empty(self, batch_size, rewind, pool)

    def restore(self, snapshot: bytes) -> State:
        """The state that `State.snapshot` saved. Raises CacheError for damaged bytes or another model's."""
        return restore(self, snapshot)

    def _layout(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int] | None,
        segment_ids: Tensor | None,
        state: State | None,
    ) -> Layout:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[0] < 1:
            raise RequestError(
                f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; give int64 ids [batch, length]."
            )
        if state is not None and (state.model is not self or state.batch_size != tokens.shape[0]):
            raise CacheError(
                f"The state has {state.batch_size} rows"
                + ("" if state.model is self else " and belongs to another model")
                + f", the call has {tokens.shape[0]}. Make one with model.new_state(batch_size={tokens.shape[0]})."
            )
        self.check_ids(tokens)
        counts = None if lengths is None else self._counts(lengths)
        layout = Layout(
            tokens.shape[0],
            tokens.shape[1],
            tokens.device,
            None if state is None else state.lengths,
            counts,
            segment_ids,
        )
        return layout if self.context is None or state is not None else LayoutPart(layout, self.context)

    def check_ids(self, tokens: Tensor | list[int]) -> None:
        """Raises RequestError for ids outside the vocabulary."""
        if not isinstance(tokens, Tensor):
            ids = tokens
        else:
            ids = tokens.flatten().tolist() if tokens.numel() < 64 else [int(tokens.min()), int(tokens.max())]
        if ids and not 0 <= min(ids) <= max(ids) < self.cfg.vocab_size:
            raise RequestError(
                f"Token ids lie between {min(ids)} and {max(ids)}, but the vocabulary has "
                f"{self.cfg.vocab_size} ids from 0. The text was probably tokenised with another model's tokenizer."
            )

    @property
    def reference(self) -> Tensor:
        """A weight in the model's dtype, on its device, that every pipeline stage has."""
        embed = self._modules.get("embed")
        if isinstance(embed, Embedding):
            return embed.weight
        block = next(layer for layer in self.layers if isinstance(layer, Block))
        return block.attn_norm.weight

    @property
    def streams_dtype(self) -> torch.dtype:
        """The precision of the residual streams."""
        return self.reference.dtype if self.compute_dtype is None else self.compute_dtype

    def own(self, x: Tensor) -> Tensor:
        """This process's part of something that belongs to whole rows, [B, S, ...]; all of it without a context."""
        if self.context is None:
            return x
        bounds, rank = part_bounds(x.shape[1], self.context.size), self.context.rank
        return x[:, bounds[rank] : bounds[rank + 1]]

    @staticmethod
    def _counts(lengths: Tensor | Sequence[int]) -> list[int]:
        """`lengths` as whole numbers. Raises RequestError for anything else."""
        try:
            return [operator.index(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        except TypeError:
            raise RequestError(f"lengths is {lengths!r}; give one whole number per row.", param="lengths") from None
