"""What a run is made of, built on every rank: the mesh, the folder's checkpoint, the data, the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rorqual import log
from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model import Transformer
from rorqual.model.engram import install_compression
from rorqual.model.init import init_weights
from rorqual.parallel import context, recompute
from rorqual.parallel.engram import spread_tables
from rorqual.parallel.expert import check_experts, spread_experts
from rorqual.parallel.launch import joined
from rorqual.parallel.mesh import Mesh, check_sizes, environment_world, gather_objects
from rorqual.parallel.stages import cut_model
from rorqual.parallel.zero import Shard
from rorqual.seeds import derive
from rorqual.train import checkpoints, routing
from rorqual.train.checkpoints import Saved
from rorqual.train.config import TrainConfig
from rorqual.train.executor import load_weights
from rorqual.train.feed import Feed
from rorqual.train.run_folder import open_folder
from rorqual.train.stages import check_warmup

logger = log.get(__name__)


def as_launched(config: TrainConfig) -> TrainConfig:
    """The config with the number of processes there is, where torchrun (or a supervisor) has decided it."""
    world = environment_world()
    if world in (1, config.run.processes):
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"processes": world})})


def check_layout(config: TrainConfig) -> None:
    """Refuse, before anything is started or read, what the processes cannot be arranged as. Raises: ConfigError."""
    p, cfg = config.parallel, config.model.build()
    dp = check_sizes(config.run.processes, dp=p.dp, cp=p.cp, pp=p.pp, ep=p.ep)
    check_experts(cfg.n_routed_experts, p.ep, p.waves)
    check_warmup(config.schedule.index_warmup, config.loss.index, cfg)
    if p.pp > cfg.num_hidden_layers:
        raise ConfigError(
            f"parallel.pp = {p.pp}, but the model has {cfg.num_hidden_layers} layers, so stages would be empty. Choose "
            f"at most {cfg.num_hidden_layers}."
        )
    s = config.schedule
    for _, length in s.seq_lens:
        if length < p.cp:
            raise ConfigError(
                f"parallel.cp = {p.cp} would cut rows of schedule.seq_lens = {length} tokens into parts without any. "
                "Choose longer rows or fewer parts."
            )
        if s.tokens_per_step // length < dp:
            logger.warning(
                "A step of %d tokens has %d rows of %d for %d replicas: some have nothing to do. Raise "
                "schedule.tokens_per_step, or use fewer processes.",
                s.tokens_per_step, max(s.tokens_per_step // length, 1), length, dp,
            )  # fmt: skip


@contextmanager
def joined_mesh(config: TrainConfig, device: torch.device) -> Iterator[Mesh]:
    """This process's place in the run; the process group lasts as long as the context."""
    with joined(device):
        if environment_world() == 1:
            yield Mesh.alone()
        else:
            p = config.parallel
            yield Mesh.build(device, dp=p.dp, cp=p.cp, pp=p.pp, ep=p.ep)


def open_together(
    folder: Path, config: TrainConfig, mesh: Mesh, *, resume: bool, allow_changes: bool
) -> tuple[Saved | None, bool]:
    """As `open_folder`; rank 0 decides, and all ranks continue from the checkpoint it found."""
    if mesh.is_main:
        saved, is_changed = open_folder(folder, config, resume=resume, allow_changes=allow_changes)
        gather_objects((None if saved is None else saved.folder, is_changed), mesh)
        return saved, is_changed
    path, is_changed = gather_objects((None, False), mesh)[0]
    return (None if path is None else checkpoints.read(path)), is_changed


def feed_in_turn(make: Callable[[], Feed], mesh: Mesh) -> Feed:
    """The feed of this rank; rank 0 makes its own before the others, which find what it prepared."""
    if mesh.is_main:
        feed = make()
        gather_objects(None, mesh)
        return feed
    gather_objects(None, mesh)
    return make()


def build_model(
    config: TrainConfig, cfg: ModelConfig, mesh: Mesh, *, is_drawn: bool
) -> tuple[Transformer, dict[str, Shard]]:
    """This rank's model on the CPU, and which of its parameters are parts of larger ones.

    With `is_drawn` it has the initial weights that a single process would draw; otherwise they are to be filled.
    """
    seed = derive(config.run.seed, "init") if is_drawn else None
    model = Transformer(cfg, None)  # no memory is touched before layers, experts and tables are cut
    cut_model(model, mesh, max(length for _, length in config.schedule.seq_lens))
    context.install(model, mesh)
    recompute.install(model, config.parallel.recompute)
    shards = spread_experts(model, mesh, waves=config.parallel.waves) | spread_tables(model, mesh.data_group)
    if seed is not None:
        init_weights(model, seed, {name: (shard.shape, shard.start) for name, shard in shards.items()})
    return model, shards


def fill_model(
    model: Transformer,
    shards: dict[str, Shard],
    config: TrainConfig,
    cfg: ModelConfig,
    feed: Feed,
    saved: Saved | None,
) -> None:
    """Weights of a checkpoint or of `model.init_from`, or the hash tables of a new model."""
    if saved is not None:
        load_weights(model, saved.weights, shards)
    elif config.model.init_from:
        _take_weights(model, shards, config.model.init_from, cfg)
    else:
        routing.install_hash_tables(model, feed.token_counts(), config.run.seed)
        if cfg.engram is not None:
            install_compression(model, feed.token_compression())


def _take_weights(model: Transformer, shards: dict[str, Shard], folder: str, cfg: ModelConfig) -> None:
    from rorqual.checkpoint import load_official

    source = load_official(folder, dtype=torch.float32)
    if source.cfg.replace(torch_dtype=cfg.torch_dtype, extra=cfg.extra) != cfg:
        logger.warning("%s has another config than this run; its weights must still fit.", folder)
    load_weights(model, source.state_dict(), shards)


def whole_model(cfg: ModelConfig, saved: Saved) -> Transformer:
    """The model of a checkpoint that several ranks wrote, in one piece on the CPU."""
    model = Transformer(cfg, None)
    load_weights(model, saved.weights, {})
    return model
