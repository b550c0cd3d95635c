"""Updates, figures and exact resume, the same for every algorithm of post-training.

An algorithm makes losses; this makes them into steps with the optimizers, parameter groups, checkpoints and metrics of
`train/`. A run that was killed and resumed has the weights of one that was not, as long as the algorithm draws its
randomness from `seeds.derive` (or torch's generators, which are saved) and keeps its position in `save`'s extra.
"""

import dataclasses
import fnmatch
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from rorqual import log
from rorqual.errors import CheckpointError, ConfigError, RorqualError
from rorqual.model import Transformer
from rorqual.model.quantised import forget, quantise, round_activations
from rorqual.ops.device import rng_state, set_rng_state
from rorqual.ops.newton_schulz import HYBRID
from rorqual.parallel.mesh import Mesh
from rorqual.posttrain.config import OptimConfig, RunConfig
from rorqual.train import checkpoints, groups
from rorqual.train.adamw import AdamW
from rorqual.train.checkpoints import Progress, Saved
from rorqual.train.device import check_device
from rorqual.train.microbatch import precision
from rorqual.train.muon import Muon
from rorqual.train.pieces import whole
from rorqual.train.report import Metrics
from rorqual.train.table_adam import TableAdam

logger = log.get(__name__)

MOST_SKIPPED = 5
"""Updates in a row without a finite gradient after which a run is lost."""

_DEVICE_RNG = "#device_rng"


@dataclasses.dataclass(frozen=True)
class Update:
    """What one optimizer step was like."""

    grad_norm: float
    """Before clipping; not finite where the step was left out."""
    lr: float
    loss: float
    """Sum of the micro-batches' losses."""

    @property
    def is_applied(self) -> bool:
        """Whether weights moved."""
        return math.isfinite(self.grad_norm)


class Trainer:
    """A model and its optimizers, in a run folder.

    `trainable` names the parameters that move, exactly or as patterns (`layers.*.attn.*`); the others are frozen here.
    None: all that require gradients. `total_steps` is where the learning rate's decay ends; without it there is none.
    `step` counts updates done, `tokens` is what `save` was told last. Use as a context manager, or call `close`.
    Raises: ConfigError for a pattern that matches nothing, trained weights that are not fp32, or no such device.
    """

    def __init__(
        self,
        model: Transformer,
        optim: OptimConfig,
        run: RunConfig,
        trainable: Iterable[str] | None = None,
        *,
        total_steps: int | None = None,
    ) -> None:
        self.model, self.optim, self.run, self.total_steps = model, optim, run, total_steps
        self.folder = Path(run.folder)
        self.step = self._first_step = 0
        self.train_seconds = 0.0
        self.tokens = 0
        self._began = time.perf_counter()
        self._num_skipped = 0
        self._metrics: Metrics | None = None
        self.dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
        if trainable is not None:
            _freeze_others(model, list(trainable))
        model.to(check_device(run.device, 1))
        self.assigned = groups.assign(model, model.cfg, matrix_optimizer=optim.kind)
        _check_masters(self.assigned)
        if run.qat != "none":
            quantise(model, run.qat)
            if model.cfg.activation_rounding == "none":
                round_activations(model, "v4")
        self._optimizers = self._build_optimizers()

    def _build_optimizers(self) -> dict[str, Muon | AdamW | TableAdam]:
        """By the prefix of their state in a checkpoint."""
        o = self.optim
        by_kind: dict[str, list[groups.Assigned]] = {"muon": [], "adamw": [], "tables": []}
        for a in self.assigned:
            by_kind[{"muon": "muon", "table": "tables"}.get(a.role.kind, "adamw")].append(a)
        return {
            "muon": Muon(
                by_kind["muon"], weight_decay=o.weight_decay, update_rms=o.muon_update_rms, steps=HYBRID
            ),
            "adamw": AdamW(by_kind["adamw"], betas=o.adam_betas, eps=o.adam_eps, weight_decay=o.weight_decay),
            "tables": TableAdam(by_kind["tables"], betas=o.adam_betas, eps=o.adam_eps),
        }  # fmt: skip

    @property
    def num_trained(self) -> int:
        """Numbers that move."""
        return sum(a.parameter.numel() for a in self.assigned)

    # ------------------------------------------------------------------ steps

    def update(self, losses: Iterable[Callable[[], Tensor]]) -> Update:
        """One optimizer step on the sum of `losses`: each is made, run backward and forgotten before the next.

        Losses are scalars that already carry their weight in the step (a mean over the batch has its denominator from
        all micro-batches). A gradient that is not finite leaves weights and optimizers as they are.
        Raises: RorqualError after several of those in a row.
        """
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        with precision(self.model, self.dtype):
            for make in losses:
                loss = make()
                if loss.requires_grad:
                    torch.autograd.backward(loss)
                total += float(loss.detach())
        lr = self.optim.lr_at(self.step, self.total_steps)
        norm = self._move(lr)
        self.step += 1
        self._num_skipped = 0 if math.isfinite(norm) else self._num_skipped + 1
        if self._num_skipped >= MOST_SKIPPED:
            raise RorqualError(
                f"{MOST_SKIPPED} updates in a row had no finite gradient (the last loss was {total}), so nothing is "
                f"learned. The last checkpoint in {self.folder} is from before. Lower optim.lr and go on from there."
            )
        return Update(norm, lr, total)

    @torch.no_grad()
    def _move(self, lr: float) -> float:
        """Clip and step; the gradient norm before clipping."""
        tables = self._optimizers["tables"]
        assert isinstance(tables, TableAdam)
        gradients = [
            a.parameter.grad for a in self.assigned if a.role.kind != "table" and a.parameter.grad is not None
        ] + tables.gradients()
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True).item() if gradients else 0.0
        if not math.isfinite(norm):
            return norm
        factor = min(self.optim.clip / (norm + 1e-6), 1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        for optimizer in self._optimizers.values():
            optimizer.step(lr)
        self.weights_moved()
        return norm

    def weights_moved(self) -> None:
        """Forget what was derived from weights before they changed."""
        forget(self.model)

    # ------------------------------------------------------------------ figures

    def log(self, step: int, **figures: Any) -> None:
        """Append a record to `metrics.jsonl`; numbers that are none become null."""
        if self._metrics is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._metrics = Metrics(self.folder / "metrics.jsonl", self._first_step)
        self._metrics.write({"step": step, **figures})

    def close(self) -> None:
        """Close the metrics."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ checkpoints

    def save(self, extra: dict[str, Any], tokens: int = 0) -> Path:
        """Write a checkpoint, whole or not at all: trained weights, buffers, optimizers, generators, `extra` (JSON).

        Frozen weights are not in it; they are those of the model that training began from.
        Raises: CheckpointError when the disk refuses.
        """
        now = time.perf_counter()
        self.tokens = tokens
        self.train_seconds, self._began = self.train_seconds + now - self._began, now
        optimizer = [
            whole(f"{prefix}/{key}", tensor)
            for prefix, part in self._optimizers.items()
            for key, tensor in part.state_dict().items()
        ]
        if (drawn := rng_state(self.model.reference.device)) is not None:
            optimizer.append(whole(_DEVICE_RNG, drawn))
        return checkpoints.save_pieces(
            self.folder,
            [whole(name, tensor) for name, tensor in self.moving().items()],
            optimizer,
            {"extra": extra},
            Progress(self.step, tokens, self.train_seconds),
            self._settings(),
            keep=self.run.keep_checkpoints,
            mesh=Mesh.alone(),
        )

    def resume(self) -> dict[str, Any] | None:
        """Go on from the newest checkpoint of the folder; its `extra`, or None where there is none (a new run).

        Raises: CheckpointError when none can be read or it is another model's, ConfigError when settings that results
        depend on are not those it was made with.
        """
        saved = checkpoints.newest(self.folder)
        if saved is None:
            return None
        self._check_settings(saved)
        self._load(saved)
        self.step = self._first_step = saved.progress.step
        self.train_seconds, self.tokens = saved.progress.train_seconds, saved.progress.tokens
        self._began = time.perf_counter()
        extra: dict[str, Any] = saved.feed["extra"]
        return extra

    @torch.no_grad()
    def _load(self, saved: Saved) -> None:
        own = self.moving()
        if set(own) != set(saved.weights):
            names = ", ".join(sorted(set(own) ^ set(saved.weights))[:5])
            raise CheckpointError(
                f"{saved.folder} holds other weights than those trained here ({names}, ...). Resume with the model and "
                "the choice of trained parameters that wrote it."
            )
        for name, tensor in own.items():
            value = saved.weights[name]
            if value.shape != tensor.shape:
                raise CheckpointError(
                    f"{saved.folder} holds {name} as {tuple(value.shape)}, the model as {tuple(tensor.shape)}. Resume "
                    "with the model that wrote it."
                )
            tensor.copy_(value)
        device_rng = saved.optimizer.pop(_DEVICE_RNG) if _DEVICE_RNG in saved.optimizer else None
        for prefix, part in self._optimizers.items():
            start = f"{prefix}/"
            part.load_state_dict({k.removeprefix(start): v for k, v in saved.optimizer.items() if k.startswith(start)})
        self.weights_moved()
        torch.set_rng_state(saved.torch_rng)
        if device_rng is not None:
            set_rng_state(self.model.reference.device, device_rng)

    def moving(self) -> dict[str, Tensor]:
        """Trained parameters and all buffers that a state holds, by name: what a checkpoint is about."""
        trained = {a.name for a in self.assigned}
        parameters = dict(self.model.named_parameters())
        state = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name in trained or name not in parameters}

    def _settings(self) -> dict[str, Any]:
        run = self.run
        return {
            "optim": self.optim.model_dump(mode="json"),
            "run": {"seed": run.seed, "dtype": run.dtype, "qat": run.qat},
            "total_steps": self.total_steps,
        }

    def _check_settings(self, saved: Saved) -> None:
        now = self._settings()
        changed = [
            f"{section}: {before!r} -> {now.get(section)!r}"
            for section, before in saved.config.items()
            if before != now.get(section)
        ]
        if changed:
            raise ConfigError(
                f"These settings differ from those of {saved.folder}:\n  " + "\n  ".join(changed) + "\nThe continued "
                "run would not equal the uninterrupted one. Put them back, or start in another folder."
            )


def _freeze_others(model: nn.Module, patterns: list[str]) -> None:
    used = set()
    for name, parameter in model.named_parameters():
        hits = [pattern for pattern in patterns if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        used.update(hits)
        parameter.requires_grad_(bool(hits))
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused or not patterns:
        raise ConfigError(
            f"No parameter is called {', '.join(map(repr, unused)) or 'anything'}, so it can't be trained. Names are "
            "those of the official layout, e.g. layers.0.attn.wq_a.weight; `*` stands for any text."
        )


def _check_masters(assigned: list[groups.Assigned]) -> None:
    if not assigned:
        raise ConfigError("No parameter of the model requires gradients, so nothing can be trained.")
    for a in assigned:
        if a.parameter.dtype != torch.float32:
            raise ConfigError(
                f"{a.name} is {a.parameter.dtype}, in which small updates are lost. Load the model with "
                "dtype=torch.float32; run.dtype=bf16 then computes in bf16 over these weights."
            )
