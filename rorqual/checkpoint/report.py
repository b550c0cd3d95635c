"""Comparing a checkpoint's tensors with the ones a configuration calls for, and saying so in words.

`match` needs headers and shapes only, so `rorqual inspect` uses it without reading a weight; `fill` copies
the data into a built model and returns the `LoadReport` that loaded models carry as `model.load_report`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rorqual.checkpoint.collector import Collector
from rorqual.checkpoint.layout import FileTensor, Shape, file_tensors, scatter
from rorqual.checkpoint.names import DOWN, GATE_UP, split_expert, stays_fp32, to_official
from rorqual.checkpoint.packed import (
    FP4_DTYPES,
    FP8_DTYPES,
    SCALE_DTYPES,
    StoredFormat,
    exponents,
    scale_name,
    scale_shape,
    unpack,
)
from rorqual.checkpoint.safetensors_io import CheckpointFiles, TensorInfo
from rorqual.checkpoint.streaming import Streaming
from rorqual.errors import CheckpointError

_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTS = {"I64", "I32"}
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TORCH |= {"I64": torch.int64, "I32": torch.int32}


@dataclass(frozen=True)
class Misfit:
    """A stored tensor that cannot go where its name belongs: shapes as stored and as the config expects."""

    name: str
    found: Shape
    expected: Shape
    why: str = "shape"

    def __str__(self) -> str:
        if self.why != "shape":
            return f"{self.name} {self.why}"
        return f"{self.name} has shape {self.found} but this config expects {self.expected}"


@dataclass
class LoadReport:
    """What a load did. Names are official (fused experts: one name a stack); `nbytes` is what was read."""

    folder: Path
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[Misfit] = field(default_factory=list)
    cast: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    scales: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """e8m0 scales of the FP8 and FP4 weights read, by official name of the weight; `save_official` can keep them."""

    def summary(self) -> str:
        """A few lines for people: counts, the first names of each problem, casts by kind, notes."""
        lines = [f"{self.folder}: {len(self.loaded)} tensors loaded, {self.nbytes / 1e6:,.1f} MB read"]
        for label, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("misshapen", [str(misfit) for misfit in self.misshapen]),
        ):
            lines.append(f"  {label}: {_first(names, 5)}" if names else f"  {label}: none")
        kinds = sorted(set(self.cast.values()))
        lines += [f"  cast: {sum(k == kind for k in self.cast.values())} tensors {kind}" for kind in kinds]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass
class Match:
    """A checkpoint held against a configuration: pairs that fit, and everything that does not."""

    fitting: list[tuple[FileTensor, TensorInfo]]
    missing: list[FileTensor]
    unexpected: list[TensorInfo]
    misshapen: list[Misfit]
    scales: dict[str, TensorInfo]
    """Scales of packed weights, by the weight's name."""


def layout_of(files: CheckpointFiles) -> Literal["official", "transformers"]:
    """Which layout a checkpoint is in, by its tensor names."""
    return "official" if all(to_official(name) == name for name in files.tensors) else "transformers"


def packed_tensors(files: CheckpointFiles) -> list[TensorInfo]:
    """The tensors stored as FP8 or FP4 codes or as their scales."""
    return [
        info for info in files.tensors.values() if _is_code(info.dtype) or to_official(info.name).endswith(".scale")
    ]


def _is_code(dtype: str) -> bool:
    return dtype.startswith(("F8", "F4")) or dtype in ("I8", "U8")


def match(files: CheckpointFiles, shapes: Mapping[str, Shape]) -> Match:
    """Pair stored tensors with our own (name -> shape). Names of either layout are understood, also mixed.

    FP4-packed weights count with their logical width; scales of packed weights belong to their weight.
    Raises: CheckpointError when two stored names mean the same tensor.
    """
    stored: dict[str, TensorInfo] = {}
    for info in files.tensors.values():
        name = to_official(info.name)
        if name in stored:
            raise CheckpointError(
                f"{files.folder} holds {stored[name].name} and {info.name}, two spellings of {name}, so it "
                "is unclear which one counts. Remove one of them."
            )
        stored[name] = info

    def is_fused(stack: str) -> bool:
        return f"{stack}.{GATE_UP}" in stored or f"{stack}.{DOWN}" in stored

    result = Match([], [], [], [], {})
    for tensor in file_tensors(shapes, is_fused):
        found = stored.pop(tensor.name, None)
        if found is None:
            result.missing.append(tensor)
            continue
        if _logical_shape(found) == tensor.shape:
            result.fitting.append((tensor, found))
            scale = stored.pop(scale_name(tensor.name), None) if _is_code(found.dtype) else None
            if scale is not None:
                result.scales[tensor.name] = scale
        else:
            result.misshapen.append(Misfit(tensor.name, found.shape, tensor.shape))
    result.unexpected = list(stored.values())
    return result


def fill(
    state: Mapping[str, Tensor], files: CheckpointFiles, *, strict: bool, collector: Collector | None = None,
    streaming: Streaming | None = None,
) -> LoadReport:  # fmt: skip
    """Copy a checkpoint into `state` (our tensor name -> tensor of a built model), cast to its dtypes.

    What the model keeps packed goes to `collector` instead, codes as they are stored; of what stays on disk `streaming`
    is told where it is.
    With `strict`, anything missing, misshapen or unexpected raises CheckpointError before a value is touched;
    without, it is listed in the report and those tensors keep the values they have.
    """
    found = match(files, {name: tuple(tensor.shape) for name, tensor in state.items()})
    check_kinds(state, found)
    report = LoadReport(
        files.folder,
        missing=[tensor.name for tensor in found.missing],
        unexpected=[info.name for info in found.unexpected],
        misshapen=found.misshapen,
    )
    if strict:
        refuse_misfits(files.folder, found)
    with torch.no_grad():
        for tensor, info in sorted(found.fitting, key=lambda pair: str(pair[1].path)):
            target = state[tensor.parts[0].ours]
            if streaming is not None and streaming.takes(tensor.parts[0].ours):
                streaming.note(tensor.parts[0], info, found.scales.get(tensor.name))
                report.loaded.append(tensor.name)
                continue
            is_packed = collector is not None and tensor.parts[0].ours in collector.formats
            codes = scale = None
            report.loaded.append(tensor.name)
            report.nbytes += info.nbytes
            is_copied = files.is_direct and not is_packed and tensor.name not in found.scales
            value = torch.empty(0) if is_copied else files.read(info.name)
            if tensor.name in found.scales:
                codes, scale = value, files.read(found.scales[tensor.name].name)
                value = torch.empty(0) if is_packed else unpack(codes, scale)
                report.nbytes += found.scales[tensor.name].nbytes
                kept = exponents(scale)
                if kept is not None and not is_packed:
                    report.scales[tensor.name] = kept
                wanted = collector.formats[tensor.parts[0].ours] if is_packed and collector else _word(target.dtype)
                if packed_format(info.dtype) != wanted:
                    report.cast[tensor.name] = f"{packed_format(info.dtype)} -> {wanted}"
            elif target.dtype != _TORCH[info.dtype]:
                report.cast[tensor.name] = f"{_word(_TORCH[info.dtype])} -> {_word(target.dtype)}"
            if is_copied and len(tensor.parts) == 1 and target.is_contiguous():
                files.copy(info.name, target)
            elif is_packed and collector is not None:
                for part in tensor.parts:
                    collector.take(part, value, codes, scale)
            else:
                scatter(state, tensor, value)
    return report


def cast_model(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Turn the model's floating tensors to `dtype` in place, except those that V4 keeps in fp32."""
    for module_name, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            is_stored = name not in module._non_persistent_buffers_set  # rope tables and the like are not
            if is_stored and tensor.is_floating_point() and not stays_fp32(f"{module_name}.{name}"):
                tensor.data = tensor.data.to(dtype)


def _logical_shape(info: TensorInfo) -> Shape:
    """The shape of the weight that a stored tensor stands for: two FP4 codes share a byte."""
    is_fp4 = info.dtype in ("I8", "U8") and len(info.shape) > 0
    return (*info.shape[:-1], 2 * info.shape[-1]) if is_fp4 else info.shape


def check_kinds(state: Mapping[str, Tensor], found: Match) -> None:
    """Move pairs whose dtype cannot be cast sensibly (an integer table into a weight, say) to the misfits."""
    fitting = []
    for tensor, info in found.fitting:
        is_float = state[tensor.parts[0].ours].is_floating_point()
        if is_float and _is_code(info.dtype):
            why = _fault_of_codes(tensor, info, found.scales.get(tensor.name))
        elif info.dtype in (_FLOATS if is_float else _INTS):
            why = ""
        else:
            kind = "a floating-point weight" if is_float else "an integer table"
            why = f"is stored as {info.dtype} but must be {kind}"
        if why:
            found.misshapen.append(Misfit(tensor.name, info.shape, tensor.shape, why))
        else:
            fitting.append((tensor, info))
    found.fitting = fitting


def packed_format(dtype: str) -> StoredFormat | None:
    """fp4 or fp8 for the dtypes those are stored in."""
    return "fp4" if dtype in FP4_DTYPES else "fp8" if dtype in FP8_DTYPES else None


def _fault_of_codes(tensor: FileTensor, info: TensorInfo, scale: TensorInfo | None) -> str:
    """Why a weight stored as FP8 or FP4 codes cannot be read; empty when it can."""
    kind = packed_format(info.dtype)
    if kind is None or len(tensor.shape) < 2:
        return f"is stored as {info.dtype}, but packed weights are matrices in F8_E4M3 or I8 (two FP4 values a byte)"
    if scale is None:
        return f"is stored as {info.dtype} codes, but the file has no {scale_name(tensor.name)} to multiply them by"
    wanted = scale_shape(tensor.shape, kind)
    if scale.dtype not in SCALE_DTYPES or scale.shape != wanted:
        return f"has scales {scale.dtype} {scale.shape}, but its {kind} codes need F8_E8M0 (or U8, F32) {wanted}"
    return ""


def refuse_misfits(folder: Path, found: Match) -> None:
    """Raises: CheckpointError unless every tensor of the config is there, and no other."""
    problems: list[str] = []
    if found.missing:
        names = [f"{tensor.name} {tensor.shape}" for tensor in found.missing]
        problems.append(f"{len(names)} tensors are missing: {_first(names, 5)}")
    if found.misshapen:
        names = [str(misfit) for misfit in found.misshapen]
        problems.append(f"{len(names)} do not fit: {_first(names, 5)}")
    if found.unexpected:
        names = [f"{info.name} {info.shape}" for info in found.unexpected]
        problems.append(f"{len(names)} are unexpected: {_first(names, 5)}")
    if problems:
        joined = ".\n  ".join(problems)
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json.\n  {joined}.\n"
            f"  A strict load takes all or nothing. {_advice(found)}"
        )


def _advice(found: Match) -> str:
    """The likeliest cause, and what to do about it."""
    loose = "or pass strict=False to load what fits."
    unexpected = [to_official(info.name) for info in found.unexpected]
    missing = [tensor.name for tensor in found.missing]
    if not found.misshapen and all(name.startswith("mtp.") for name in missing + unexpected):
        word = "lacks" if missing else "has more of"
        return f"The file only {word} MTP tensors: correct num_nextn_predict_layers in config.json {loose}"
    if any(split_expert(name) for name in missing + unexpected) and not found.misshapen:
        return f"Compare n_routed_experts, num_hidden_layers and compress_ratios with the weights, {loose}"
    return f"Check that config.json belongs to these weights and that the copy is complete, {loose}"


def _first(names: list[str], count: int) -> str:
    rest = f", and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
