"""Teachers of a distillation: one model in memory at a time, their states cached, their heads brought in one by one.

Source: V4 report, on-policy distillation. A teacher runs forward over the sampled trajectories once and goes again;
what stays is the hidden state of each compared place (`hidden_cache.py`). In training, samples are ordered by teacher,
so each head is loaded once a mini-batch; at most one is resident on the device while the next is read to host memory by
a thread. Quantisation-aware training's rounding applies to teachers too, so that like is compared with like.

T places of a span, D hidden, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rorqual.checkpoint.adapters import merge_adapter
from rorqual.checkpoint.load import load_model
from rorqual.checkpoint.names import to_official
from rorqual.checkpoint.safetensors_io import CheckpointFiles, model_files
from rorqual.errors import CheckpointError
from rorqual.model import Transformer
from rorqual.model.quantised import ExpertFormat, quantise, round_activations
from rorqual.ops.fake_quant import rounded_weight
from rorqual.posttrain.distill import log_probs, response_rows
from rorqual.posttrain.distill_decision import Decision, follow
from rorqual.posttrain.hidden_cache import HiddenCache, StateKey, TeacherStates

HEAD = "head.weight"
SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Sample:
    """A trajectory that the student wrote."""

    id: str
    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    """True for ids that the student wrote."""
    domain: str = ""
    prompt_id: str = ""

    @property
    def rows(self) -> list[int]:
        """Places that are compared: those before an id the student wrote."""
        return response_rows(self.mask)

    @property
    def span(self) -> tuple[int, int]:
        """The places [start, stop) that contain all rows."""
        rows = self.rows
        return (rows[0], rows[-1] + 1) if rows else (0, 0)


@dataclass(frozen=True)
class Teacher:
    """Where a teacher comes from and what it teaches."""

    name: str
    folder: Path
    weight: float = 1.0
    """Its importance w_i."""
    domains: tuple[str, ...] = ()
    """Whose samples it is asked about; all unless given."""
    adapter: Path | None = None
    weights: str | None = None
    """Packed format to run in, which takes less memory (`model/packed_weights.py`)."""
    qat: ExpertFormat | None = None
    """Round its weights as the released files hold them."""
    dtype: torch.dtype = torch.float32
    decide: Callable[[Sample], Decision | None] | None = field(default=None, compare=False)
    """A gate: what is put in the model's place for a sample, if anything."""

    def teaches(self, sample: Sample) -> bool:
        """Whether it has a say about a sample."""
        return not self.domains or sample.domain in self.domains

    def version(self) -> str:
        """Names weights and settings: states of another version are another's. Raises: CheckpointError."""
        digest = hashlib.blake2b(digest_size=12)
        for folder in (self.folder, self.adapter):
            if folder is not None:
                _add_files(digest, folder)
        digest.update(json.dumps([self.weights, self.qat, str(self.dtype)]).encode())
        return digest.hexdigest()

    def load(self, device: str | torch.device = "cpu") -> Transformer:
        """The model, frozen and rounded as asked. Raises: CheckpointError, ConfigError as `load_model`."""
        model = load_model(self.folder, dtype=self.dtype, device=device, weights=self.weights)
        if self.adapter is not None:
            merge_adapter(model, self.adapter)
        if self.qat is not None:
            quantise(model, self.qat)
            if model.cfg.activation_rounding == "none":
                round_activations(model, "v4")
        return model.eval().requires_grad_(False)

    def head(self) -> Tensor:
        """The output head alone, [V, D], as the loaded model would use it; nothing else is read.

        Raises: CheckpointError when the files lack it.
        """
        with CheckpointFiles(self.folder) as files:
            name = next((name for name in files.tensors if to_official(name) == HEAD), None)
            if name is None:
                raise CheckpointError(
                    f"{self.folder} has no tensor {HEAD} (or lm_head.weight), so the teacher {self.name}'s logits "
                    "cannot be rebuilt. Give a whole checkpoint."
                )
            head = files.read(name).to(self.dtype).clone()  # a copy: the file is closed
        return head if self.qat is None else rounded_weight(head, "bf16")


def _add_files(digest: "hashlib.blake2b", folder: Path) -> None:
    """Config and weights of a folder: small files whole, large ones by size, header and evenly spaced places."""
    files = [*model_files(folder), *folder.glob("*.json"), *folder.glob("adapter_model.safetensors")]
    for path in sorted({path for path in files if "tokenizer" not in path.name}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for at in range(0, size, max(SAMPLE_BYTES, size // 64)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))


# ---------------------------------------------------------------- states


def key_of(sample: Sample, teacher: str, version: str) -> StateKey:
    """Where a teacher's states of a sample are kept."""
    return StateKey(sample.id, *sample.span, teacher, version)


@torch.no_grad()
def hidden_states(model: Transformer, samples: Sequence[Sample], batch_tokens: int) -> Iterator[tuple[Sample, Tensor]]:
    """What enters the head at each sample's span, [T, D]; trajectories of like lengths run together."""
    device = model.reference.device
    for part in batches_of(samples, batch_tokens, lambda sample: sample.span[1]):
        lengths = [sample.span[1] for sample in part]
        rows = torch.zeros(len(part), max(lengths), dtype=torch.int64)
        for row, (sample, length) in enumerate(zip(part, lengths, strict=True)):
            rows[row, :length] = torch.tensor(sample.ids[:length])
        hidden = model.final_hidden(model.forward_streams(rows.to(device), lengths=lengths))
        for row, sample in enumerate(part):
            start, stop = sample.span
            yield sample, hidden[row, start:stop]


def batches_of(samples: Sequence[Sample], most_tokens: int, length: Callable[[Sample], int]) -> Iterator[list[Sample]]:
    """Samples in batches of like lengths, each at most `most_tokens` when padded (or one sample)."""
    left = sorted(samples, key=length)
    while left:
        count = max(1, most_tokens // max(length(left[-1]), 1))
        yield left[-count:]
        left = left[:-count]


def fill_cache(
    cache: HiddenCache, teachers: Sequence[Teacher], versions: Mapping[str, str], samples: Sequence[Sample], *,
    batch_tokens: int = 8192, device: str | torch.device = "cpu", chunk: int = 1024,
) -> list[str]:  # fmt: skip
    """Run every teacher over those of its samples whose states are not there; one model is in memory at a time.

    Returns the teachers that were loaded, in order. Raises: as `Teacher.load`.
    """
    loaded = []
    for teacher in teachers:
        missing = [
            sample
            for sample in samples
            if teacher.teaches(sample)
            and sample.rows
            and key_of(sample, teacher.name, versions[teacher.name]) not in cache
        ]
        if not missing:
            continue
        model = teacher.load(device)
        loaded.append(teacher.name)
        found = {
            key_of(sample, teacher.name, versions[teacher.name]): _states(
                teacher, model, sample, hidden, cache.dtype, chunk
            )
            for sample, hidden in hidden_states(model, missing, batch_tokens)
        }
        cache.put(found)
        del model
    return loaded


def _states(
    teacher: Teacher, model: Transformer, sample: Sample, hidden: Tensor, dtype: torch.dtype, chunk: int
) -> TeacherStates:
    kept = hidden.to(dtype)
    decision = None if teacher.decide is None else teacher.decide(sample)
    if decision is None:
        return TeacherStates(kept)
    start, stop = sample.span
    rows, answer = sample.rows, [sample.ids[row + 1] for row in sample.rows]
    at = kept[[row - start for row in rows]]
    own: list[float] = []
    with torch.no_grad():
        for lo in range(0, len(rows), chunk):
            scores = log_probs(at[lo : lo + chunk], model.head.weight)
            picked = torch.tensor(answer[lo : lo + chunk], device=scores.device).unsqueeze(-1)
            own += scores.gather(-1, picked).squeeze(-1).tolist()
    found_share, found_token = follow(decision, answer, own)
    share, token = torch.zeros(stop - start), torch.full((stop - start,), -1)
    places = torch.tensor([row - start for row in rows])
    share[places], token[places] = found_share, found_token
    return TeacherStates(kept, share, token)


# ---------------------------------------------------------------- heads


class Heads:
    """Output heads, one at a time on the device; the next is read by a thread meanwhile.

    read: the head by the teacher's name, in host memory. `loads` lists what was brought in, in order. On a CPU the
    device's memory is the host's, so the one that is read ahead lies beside the one in use.
    """

    def __init__(self, read: Callable[[str], Tensor], device: str | torch.device = "cpu") -> None:
        self._read, self.device = read, torch.device(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rorqual-head")
        self._name: str | None = None
        self._head: Tensor | None = None
        self._next: tuple[str, Future[Tensor]] | None = None
        self.loads: list[str] = []

    @property
    def num_resident(self) -> int:
        """Heads on the device: never more than one."""
        return int(self._head is not None)

    def use(self, name: str, upcoming: str | None = None) -> Tensor:
        """The head of one teacher; `upcoming` is read in the background. Raises: what reading raised."""
        if name != self._name:
            self._head = self._name = None  # first, so that two are never there
            is_read = self._next is not None and self._next[0] == name
            host = self._next[1].result() if is_read and self._next is not None else self._read(name)
            self._next = None
            self._head, self._name = host.to(self.device), name
            self.loads.append(name)
        if upcoming is not None and upcoming != name and (self._next is None or self._next[0] != upcoming):
            self._next = upcoming, self._pool.submit(self._read, upcoming)
        assert self._head is not None
        return self._head

    def release(self) -> None:
        """Give the memory back."""
        self._head = self._name = self._next = None

    def close(self) -> None:
        """End the reading thread."""
        self.release()
        self._pool.shutdown(wait=True)

    def __enter__(self) -> "Heads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def by_teacher(teachers: Sequence[Teacher], samples: Iterable[Sample]) -> list[tuple[Teacher, list[Sample]]]:
    """Every teacher with its samples, in one fixed order: how a mini-batch is dispatched."""
    found = [
        (teacher, [sample for sample in samples if teacher.teaches(sample) and sample.rows]) for teacher in teachers
    ]
    return [(teacher, mine) for teacher, mine in found if mine]
