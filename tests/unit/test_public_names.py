"""The public names of the package: what examples, docs and outside scripts may rely on."""

import subprocess
import sys
from types import ModuleType

import pytest

import rorqual

PUBLIC = [
    "AsyncSandbox",
    "Engine",
    "Journal",
    "ModelConfig",
    "SamplingParams",
    "Sandbox",
    "Transformer",
    "__version__",
    "chat",
    "checkpoint",
    "load",
]
PUBLIC_BELOW = [
    ("checkpoint", "load_official"),
    ("checkpoint", "save_official"),
    ("checkpoint", "save_transformers"),
    ("chat", "encode_messages"),
    ("chat", "parse_completion"),
    ("chat", "StreamParser"),
]


def test_the_list_is_complete() -> None:
    assert sorted(rorqual.__all__) == PUBLIC
    assert dir(rorqual) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_name_can_be_imported(name: str) -> None:
    assert getattr(rorqual, name) is not None


@pytest.mark.parametrize(("module", "name"), PUBLIC_BELOW)
def test_name_below_can_be_imported(module: str, name: str) -> None:
    room = getattr(rorqual, module)
    assert isinstance(room, ModuleType)
    assert callable(getattr(room, name))


def test_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Modle'; public names: AsyncSandbox, Engine, Journal"):
        _ = rorqual.Modle


def test_methods_of_the_config() -> None:
    cfg = rorqual.ModelConfig.preset("minke")
    assert rorqual.ModelConfig.from_dict(cfg.to_dict()) == cfg


def test_importing_the_package_imports_no_room() -> None:
    code = "import rorqual, sys; print([m for m in sys.modules if m.startswith('rorqual.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
