"""The house rule: a room imports only rooms on lines below its own, read from the source with `ast`.

Imports inside functions and under `TYPE_CHECKING` count too: a late import upwards still goes upwards.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rorqual

PACKAGE = Path(rorqual.__file__).parent

LINES = [  # from top to bottom; rooms on one line do not know each other
    {"__init__", "__main__"},
    {"cli"},
    {"server", "evals"},
    {"posttrain", "agents", "referee"},
    {"train", "sandbox"},
    {"engine", "parallel"},
    {"chat", "data", "tokenizer", "checkpoint", "planner", "journal", "ledger"},
    {"model"},
    {"ops"},
    {"config", "config_dialects", "config_engram", "errors", "folders", "log", "money", "seeds", "sizes"},
]
SAME_LINE = {
    ("posttrain", "agents"),
    ("data", "chat"),
    ("data", "tokenizer"),
    ("chat", "tokenizer"),
    ("checkpoint", "tokenizer"),  # `rorqual.load` hands out a model and its tokenizer
    ("planner", "checkpoint"),  # a plan counts bytes as the files hold them
}
FOUNDATION = {
    ("config", "errors"),
    ("config", "config_dialects"),
    ("config_dialects", "errors"),
    ("config", "config_engram"),
    ("config_engram", "errors"),
    ("config", "log"),
    ("log", "errors"),
    ("seeds", "errors"),
    ("money", "errors"),
    ("sizes", "errors"),
}
FORBIDDEN = {("server", "train"), ("server", "evals")}
ORACLES_AND_CLIENTS = {"transformers", "deepseek_recipe", "openai", "anthropic", "pytest", "hypothesis"}
HEIGHT = {room: len(LINES) - index for index, line in enumerate(LINES) for room in line}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """`rorqual.ops.rope` for its file; a package's `__init__.py` is the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(tree: ast.Module, importer: str, is_package: bool, *, top_level_only: bool) -> Iterator[str]:
    """Full names of the modules a file imports; `from package import module` counts as the module."""
    nodes = at_import_time(tree.body) if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = importer.split(".")
                above = above[: len(above) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES or base == "rorqual" else base


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not function bodies, not `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import_time(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import_time(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import_time(handler.body)
        else:
            yield node


def room_of(module: str) -> str:
    """The room a module of the package lies in: its second name part."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def may_import(importer: str, target: str) -> bool:
    """Whether room `importer` may import room `target`."""
    pair = (importer, target)
    if pair in FORBIDDEN:
        return False
    return importer == target or HEIGHT[importer] > HEIGHT[target] or pair in SAME_LINE or pair in FOUNDATION


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_flow_downward(module: str) -> None:
    path = MODULES[module]
    room = room_of(module)
    assert room in HEIGHT, f"{module}: room {room!r} stands on no line; add it to the design and to LINES here"
    tree = ast.parse(path.read_text())
    for target in imported(tree, module, path.name == "__init__.py", top_level_only=False):
        outside, _, name = target.partition(".")
        assert outside not in ORACLES_AND_CLIENTS, f"{module} imports {target}: the package never does, only tests"
        if outside != "rorqual" or target == "rorqual.__version__":
            continue
        assert name, f"{module} imports the rorqual facade; import the room that defines the name"
        assert may_import(room, room_of(target)), f"{module} imports {target}: {room} may not import that room"


def test_the_rule_bites() -> None:
    assert may_import("engine", "model") and may_import("data", "chat") and may_import("cli", "ops")
    assert not may_import("model", "engine")
    assert not may_import("chat", "data")
    assert not may_import("server", "train")
    assert not may_import("engine", "parallel")
    tree = ast.parse("import torch\ndef f():\n    from rorqual.config import ModelConfig\n")
    assert list(imported(tree, "rorqual.x", False, top_level_only=True)) == ["torch"]
    assert list(imported(tree, "rorqual.x", False, top_level_only=False)) == ["torch", "rorqual.config"]
    relative = ast.parse("from . import rope\nfrom ..errors import ConfigError\n")
    assert list(imported(relative, "rorqual.ops.norms", False, top_level_only=False)) == [
        "rorqual.ops.rope" if "rorqual.ops.rope" in MODULES else "rorqual.ops",
        "rorqual.errors",
    ]


def test_no_circular_imports() -> None:
    graph = {
        module: {
            target
            for target in imported(ast.parse(path.read_text()), module, path.name == "__init__.py", top_level_only=True)
            if target in MODULES and target != module
        }
        for module, path in MODULES.items()
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "circular import: " + " -> ".join([*trail[trail.index(module) :], module])
        if module in finished:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        finished.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("module", ["rorqual", "rorqual.cli", "rorqual.config", "rorqual.chat", "rorqual.ledger"])
def test_imports_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"importing {module} brings torch in (or fails)\n{result.stderr}"
