"""Which layers a pipeline stage holds: consecutive ones, cut so that the costliest stage costs as little as possible.

The first stage also holds the embedding (a lookup, free), the last one HC head, norm, output head and MTP with a copy
of the embedding, which MTP reads. Costs are forward operations per token; layers differ by what their attention reads,
and head and MTP weigh as much as some layers, so stages seldom hold equally many. Source: V4 report, pipeline
parallelism; the rule of cutting by operations is ours.
"""

from collections.abc import Sequence

from torch import nn

from rorqual.config import LayerSpec, ModelConfig
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.parallel.mesh import Mesh
from rorqual.planner.flops import attention_keys

AT_THE_END = ("norm", "head")
"""Modules that only the last stage holds, besides MTP."""


def cut_model(model: Transformer, mesh: Mesh, seq_len: int) -> None:
    """Take away from `model` what other stages of `mesh` hold; what stays keeps its names.

    `seq_len` is the row length to balance for. Does nothing with one stage. Raises: ConfigError with fewer layers than
    stages.
    """
    if mesh.pp == 1:
        return
    everything = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    bounds = stage_bounds(*costs(model, seq_len), mesh.pp)
    begin, end = bounds[mesh.pp_rank], bounds[mesh.pp_rank + 1]
    model.is_first, model.is_last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1
    for index in range(len(model.layers)):
        if not begin <= index < end:
            model.layers[index] = nn.Identity()
    if not model.is_first and not (model.is_last and len(model.mtp)):
        model.register_module("embed", None)
    if not model.is_last:
        for name in AT_THE_END:
            model.register_module(name, None)
        for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
            model.register_parameter(name, None)
        model.mtp = nn.ModuleList()
    rest = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    model.elsewhere = frozenset(everything - rest)


def copies(model: Transformer) -> set[str]:
    """Parameters here that belong to another stage: their gradients add up, and checkpoints have them from there."""
    return {"embed.weight"} if model.is_last and not model.is_first and len(model.mtp) else set()


def costs(model: Transformer, seq_len: int) -> tuple[list[float], float]:
    """Operations per token of every layer of a whole model, and of what follows the last."""
    cfg = model.cfg
    layers = [
        _weights(cfg, layer) + _attention(cfg, spec, seq_len)
        for layer, spec in zip(model.layers, cfg.layers, strict=True)
    ]
    head = 2.0 * cfg.vocab_size * cfg.hidden_size
    modules = [
        _weights(cfg, module) + _attention(cfg, spec, seq_len) + head
        for module, spec in zip(model.mtp, cfg.mtp_layers, strict=True)
    ]
    return layers, head + sum(modules)


def stage_bounds(layers: Sequence[float], tail: float, stages: int) -> list[int]:
    """First layer of each stage, and past the last: [stages + 1]. The largest stage is as small as can be.

    `tail` is added to the last stage. Raises: ConfigError with fewer layers than stages.
    """
    count = len(layers)
    if count < stages:
        raise ConfigError(
            f"parallel.pp = {stages}, but the model has {count} layers, so some stages would have none. Choose at most "
            f"{count} stages."
        )
    before = [0.0]
    for cost in layers:
        before.append(before[-1] + cost)
    # best[end]: least possible largest stage when the stages so far hold the layers up to `end`, and their bounds
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for stage in range(stages):
        extra = tail if stage == stages - 1 else 0.0
        found: dict[int, tuple[float, list[int]]] = {}
        for end in range(stage + 1, count - (stages - 1 - stage) + 1):
            options = [
                (max(largest, before[end] - before[begin] + extra), [*bounds, end])
                for begin, (largest, bounds) in best.items()
                if begin < end
            ]
            found[end] = min(options)
        best = found
    return best[count][1]


def _weights(cfg: ModelConfig, module: nn.Module) -> float:
    """Two operations for every weight that works on a token."""
    total = 0.0
    for name, parameter in module.named_parameters():
        if name.startswith("engram.table"):
            continue
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if ".experts." in name else 1.0
        total += 2.0 * parameter.numel() * share
    return total


def _attention(cfg: ModelConfig, spec: LayerSpec, seq_len: int) -> float:
    return 4.0 * cfg.num_attention_heads * cfg.head_dim * attention_keys(cfg, spec, seq_len)
