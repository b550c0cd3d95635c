"""The house rule: outside `ops/` no file of the package names a kind of device, so that all of them run on any.

Names of makers' libraries do not belong there either. Two looks: at the words of every file, comments and web pages
included, for the name that slips in most easily; and at the code, for all names and for torch modules that carry them.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rorqual
from rorqual.ops import device

PACKAGE = Path(rorqual.__file__).parent
WRITTEN = {".py", ".c", ".h", ".html", ".js", ".css", ".json", ".toml", ".txt", ".md"}
FILES = sorted(
    path
    for path in PACKAGE.rglob("*")
    if path.suffix in WRITTEN and path.relative_to(PACKAGE).parts[0] not in ("ops", "assets")
)
NAMES = frozenset(device.DEVICE_NAMES)


def words_in(text: str) -> list[str]:
    """Lines that hold `cuda` in any form: `torch.cuda`, `is_cuda`, "cuda:0", TORCH=CUDA."""
    return [line.strip() for line in text.splitlines() if re.search("cuda", line, re.IGNORECASE)]


def names_in(source: str) -> Iterator[str]:
    """Device names that code uses: attributes, arguments, imports, and strings that are not docstrings."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Attribute):
            found = node.attr.split("_")
        elif isinstance(node, ast.Name):
            found = node.id.split("_")
        elif isinstance(node, ast.alias):
            found = re.split(r"[._]", node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found = re.findall(r"[a-z]+", node.value.lower())
        yield from (f"line {getattr(node, 'lineno', 0)}: {word}" for word in found if word in NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_but_ops_names_a_device(path: Path) -> None:
    text = path.read_text()
    assert not words_in(text), "ask rorqual/ops/device.py or torch.accelerator instead"
    if path.suffix == ".py":
        assert not list(names_in(text)), "ask rorqual/ops/device.py or torch.accelerator instead"


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()", "x = x.cuda()", "if x.is_cuda: pass", "x.to('cuda:1')", "import torch.cuda",
        "from torch.backends import mps", "torch.xpu.empty_cache()", "device = 'npu'", "import torch_npu",
        "dist.init_process_group('nccl')", "dist.init_process_group('cpu:gloo,npu:hccl')", "x.to(f'xpu:{index}')",
    ],
)  # fmt: skip
def test_the_rule_bites(line: str) -> None:
    source = f'"""The docstring may say mps."""\n\n\ndef f():\n    """And npu."""\n    {line}\n'
    assert list(names_in(source)), line
    assert bool(words_in(source)) == ("cuda" in line)


def test_the_rule_leaves_other_words_alone() -> None:
    assert not list(names_in('"""mps and npu."""\ncomps = dumps(x)\ninput = "steps; a hipster, an xpub"\n'))
    assert len(FILES) > 100 and any(path.suffix == ".html" for path in FILES)


def test_what_is_here_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator, and with one that a package registered."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device.accelerator() is None and device.describe()
    assert device.name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    assert device.accelerator() == torch.device("xpu")
    assert device.describe().startswith("8 x xpu")


def test_staging_never_fails() -> None:
    """Pinned where there is an accelerator that can use it, else the tensor itself."""
    x = torch.arange(5)
    assert torch.equal(device.staged(x), x)
