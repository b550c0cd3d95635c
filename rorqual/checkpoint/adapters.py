"""Adapter folders in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

A tensor's name says which module it is for, `base_model.model.MODULE.lora_A.weight` [r, in] and `.lora_B.weight`
[out, r], with MODULE in the official layout's words (`layers.3.attn.wq_a`, one a routed expert:
`layers.3.ffn.experts.7.w1`) or in those of transformers (`model.layers.3.self_attn.q_a_proj`), where PEFT loads it onto
`DeepseekV4ForCausalLM`. Either is read, and which modules there are follows from the tensors alone.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rorqual.checkpoint.names import to_official, to_transformers
from rorqual.checkpoint.safetensors_io import read_header, save_tensors, sync, temporary, write_text
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model import Transformer, adapters
from rorqual.model.adapters import AdapterSpec, Target

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.(w[123])")

AdapterLayout = Literal["official", "transformers"]

_REFUSED = {
    "use_dora": "DoRA's magnitudes", "bias": "trained biases", "modules_to_save": "modules trained whole",
    "rank_pattern": "ranks by module", "alpha_pattern": "alphas by module", "fan_in_fan_out": "transposed weights",
    "target_parameters": "adapters on fused parameters", "lora_bias": "biases of adapters",
}  # fmt: skip
"""Settings of PEFT that change the function and are not known here, with what they mean."""


def save_adapter(
    model: Transformer, folder: str | Path, *, layout: AdapterLayout = "official", base: str | None = None
) -> Path:
    """Write a model's adapter, fp32 or bf16 as it is; returns the weight file. `base`: what the model is called.

    Raises: ConfigError without an adapter, or for the layout of transformers with adapters on routed experts, which it
    holds in fused tensors that PEFT's names cannot say apart; CheckpointError when the disk refuses.
    """
    spec, folder = adapters.spec_of(model), Path(folder)
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    for target in adapters.adapted(model):
        for module, pair in _modules(target):
            name = module if layout == "official" else _transformers_module(module)
            modules.append(name)
            for letter, tensor in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous().clone()
    path = folder / WEIGHTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = temporary(path)
        save_tensors(tensors, beside, metadata={"format": "pt"})
        sync(beside)
        beside.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the adapter to {folder}: {error}. Check free space and permissions, then save again."
        ) from error
    write_text(folder / CONFIG, json.dumps(_describe(spec, modules, base), indent=2) + "\n")
    return path


def load_adapter(model: Transformer, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Attach the adapter in `folder` to a model (`adapters.attach`) and fill it; returns its parameters' names.

    Raises: CheckpointError for files that are missing, damaged, incomplete or of another model; ConfigError for
    settings that would make another function of it.
    """
    folder = Path(folder)
    settings = _read_config(folder)
    pairs = _read_pairs(folder)
    by_target: dict[str, dict[int | None, dict[str, Tensor]]] = {}
    for module, found in pairs.items():
        expert = _EXPERT.fullmatch(module)
        name, index = (module, None) if expert is None else (f"{expert[1]}.{expert[3]}", int(expert[2]))
        by_target.setdefault(name, {})[index] = found
    targets = {target.name: target for target in adapters.possible_targets(model)}
    foreign = sorted(set(by_target) - set(targets))
    if foreign:
        raise CheckpointError(
            f"the adapter in {folder} is for {len(foreign)} modules that this model has not ({', '.join(foreign[:3])}, "
            "...), so it belongs to another model. Give the base that it was trained on."
        )
    spec = _spec(settings, tuple(by_target), pairs)
    stacked = {name: _stack(targets[name], by_target[name], spec, folder) for name in targets if name in by_target}
    adapters.attach(model, spec)
    with torch.no_grad():
        for target in adapters.adapted(model):
            for parameter, value in zip(adapters.pair(target), stacked[target.name], strict=True):
                if parameter.shape != value.shape:
                    raise CheckpointError(
                        f"the adapter in {folder} has {tuple(value.shape)} for {target.name}, whose weight "
                        f"{target.shape} needs {tuple(parameter.shape)}. It belongs to another model."
                    )
                parameter.copy_(value)
                parameter.data = parameter.data.to(dtype)
    return adapters.adapter_names(model)


def merge_adapter(model: Transformer, folder: str | Path) -> None:
    """Load the adapter in `folder` and add it to the weights, or leave it beside them where weights are packed.

    Raises: as `load_adapter`.
    """
    from rorqual.model.packed_weights import packed

    load_adapter(model, folder)
    if next(packed(model), None) is None:
        adapters.merge(model)


def _modules(target: Target) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    a, b = adapters.pair(target)
    if target.matrix is None:
        return [(target.name, (a, b))]
    stack = target.name.rpartition(".")[0]
    return [(f"{stack}.{e}.{target.matrix}", (a[e], b[e])) for e in range(a.shape[0])]


def _transformers_module(module: str) -> str:
    if _EXPERT.fullmatch(module):
        raise ConfigError(
            f"{module} has an adapter, but transformers holds the routed experts of a layer in fused tensors, so PEFT "
            "has no name for it. Save the adapter in the official layout, or merge it and save the model."
        )
    return to_transformers(f"{module}.weight").removesuffix(".weight")


def _describe(spec: AdapterSpec, modules: list[str], base: str | None) -> dict[str, Any]:
    """What PEFT's `LoraConfig` reads. Many modules are named by the expression that all of them match."""
    short = sorted({re.sub(r"\.\d+\.", ".*.", module) for module in modules})
    expression = "|".join(re.escape(name).replace(r"\.\*\.", r"\.\d+\.") for name in short)
    whole = sorted(modules) if len(modules) <= 512 else expression
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": spec.rank,
        "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "target_modules": whole, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False,
    }  # fmt: skip


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is not LORA but {settings.get('peft_type') if settings else settings!r}")
        for name in ("r", "lora_alpha"):
            if not isinstance(settings[name], int | float) or isinstance(settings[name], bool) or settings[name] <= 0:
                raise ValueError(f"{name} is {settings[name]!r}")
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no readable {CONFIG} ({error.strerror or error}), so there is no adapter to load. Point at "
            f"a folder with {CONFIG} and {WEIGHTS}."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not describe a LoRA adapter ({error}), so its scale is unknown. Save the adapter again."
        ) from error
    for name, meaning in _REFUSED.items():
        if settings.get(name) not in (None, False, "none", {}, []):
            raise ConfigError(
                f"{path} has {name}={settings[name]!r}: {meaning} are not known here, and leaving them out would make "
                "another function of the adapter. Merge it with PEFT and load the merged model."
            )
    return settings


def _read_pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A and B by official module name."""
    path = folder / WEIGHTS
    infos = read_header(path)
    from safetensors.torch import load_file

    values: Mapping[str, Tensor] = load_file(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    for info in infos:
        match = _TENSOR.fullmatch(info.name)
        if match is None or len(info.shape) != 2:
            raise CheckpointError(
                f"{path} has the tensor {info.name} {info.shape}, which is no lora_A or lora_B of a module, so it is "
                "unclear what it adds. Save the adapter with PEFT's or Rorqual's own function."
            )
        module = to_official(f"{match[1]}.weight").removesuffix(".weight")
        pairs.setdefault(module, {})[match[2]] = values[info.name]
    halves = [module for module, found in pairs.items() if set(found) != {"A", "B"}]
    if halves or not pairs:
        raise CheckpointError(
            f"{path} has only one of lora_A and lora_B for {', '.join(halves[:3]) or 'anything'}, so nothing can be "
            "added there. Copy or save the adapter again."
        )
    return pairs


def _spec(
    settings: Mapping[str, Any], names: tuple[str, ...], pairs: Mapping[str, Mapping[str, Tensor]]
) -> AdapterSpec:
    rank = int(settings["r"])
    alpha = float(settings["lora_alpha"])
    if settings.get("use_rslora"):  # alpha / sqrt(r) in place of alpha / r
        alpha *= rank**0.5
    is_expert = any(_EXPERT.fullmatch(module) for module in pairs)
    dropout = 0.0 if is_expert else float(settings.get("lora_dropout") or 0.0)
    return AdapterSpec(rank, alpha, names, dropout)


def _stack(
    target: Target, found: Mapping[int | None, Mapping[str, Tensor]], spec: AdapterSpec, folder: Path
) -> tuple[Tensor, Tensor]:
    """A and B as the model holds them; an expert without a pair gets zeros."""
    if target.matrix is None:
        pair = found[None]
        return pair["A"], pair["B"]
    count, out, width = target.shape
    highest = max(index for index in found if index is not None)
    if highest >= count:
        raise CheckpointError(
            f"the adapter in {folder} is for expert {highest} of {target.name}, which has {count}, so it belongs to "
            "another model. Give the base that it was trained on."
        )
    a, b = torch.zeros(count, spec.rank, width), torch.zeros(count, out, spec.rank)
    for index, pair in found.items():
        assert index is not None
        if pair["A"].shape != a.shape[1:] or pair["B"].shape != b.shape[1:]:
            raise CheckpointError(
                f"the adapter in {folder} has {tuple(pair['A'].shape)} and {tuple(pair['B'].shape)} for expert {index} "
                f"of {target.name}, which needs {tuple(a.shape[1:])} and {tuple(b.shape[1:])}. It belongs to another "
                "model."
            )
        a[index], b[index] = pair["A"].float(), pair["B"].float()
    return a, b
