"""Recipes as TOML files: layered left to right, then `--set a.b=c`; checked, and written out again.

The reading serves any tree of pydantic sections: `load_config` is pre-training's, `read_tree`, `check` and `table` are
what other recipes are made of.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rorqual.errors import ConfigError
from rorqual.train.config import TrainConfig
from rorqual.train.settings import plain

_Config = TypeVar("_Config", bound=BaseModel)


def load_config(recipes: Sequence[str | Path] = (), settings: Iterable[str] = ()) -> TrainConfig:
    """Read recipes (later ones win, key by key) and apply `a.b=c` settings.

    Raises: ConfigError for an unreadable file, an unknown key or a bad value, naming each.
    """
    return validate(read_tree(recipes, settings))


def read_tree(recipes: Sequence[str | Path] = (), settings: Iterable[str] = ()) -> dict[str, Any]:
    """Recipes and settings as one tree of plain values, not yet checked against any section.

    A setting's value is read as TOML where it is TOML (`1e-3`, `true`, `[1, 2]`) and as text otherwise; a number in its
    name picks one of a list of tables (`stages.0.optim.lr=1e-4`).
    Raises: ConfigError for an unreadable file, a setting without '=' or with a number beyond its list.
    """
    tree: dict[str, Any] = {}
    for recipe in recipes:
        _merge(tree, _read_toml(Path(recipe)))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {setting!r} has no '='. A setting is a dotted name and a value. Write --set optim.lr=1e-3."
            )
        branch: dict[str, Any] = {}
        _put(branch, key.strip().split("."), _parse(text.strip()))
        _merge(tree, branch)
    return tree


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """A checked config from nested plain values. Raises ConfigError listing every fault by dotted name."""
    return check(TrainConfig, tree, what="The training config", command="rorqual train")


def check(kind: type[_Config], tree: Mapping[str, Any], *, what: str, command: str, prefix: str = "") -> _Config:
    """A section of class `kind` from nested plain values; `prefix` stands before the names in messages (`stages.0.`).

    Raises: ConfigError listing every fault by dotted name; `what` says whose they are, `command` which command's
    `--show-config` explains the settings.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            name = prefix + ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden":
                lines.append(f"  {name}: there is no such setting{_suggestion(kind, fault['loc'])}")
            else:
                lines.append(f"  {name}: {fault['msg']} (got {fault['input']!r})")
        raise ConfigError(
            f"{what} cannot be used:\n" + "\n".join(lines) + "\n"
            f"Correct the recipe or the --set option; `{command} --show-config` prints every setting "
            "with its meaning."
        ) from None


def run_recipe(config: TrainConfig) -> str:
    """The recipe a run folder keeps: all settings but `run.max_steps`, which is for one sitting only."""
    return to_toml(config.model_copy(update={"run": config.run.model_copy(update={"max_steps": None})}))


def to_toml(config: BaseModel) -> str:
    """The config as a TOML recipe, every field under its description. Fields that are unset are left out."""
    return "\n".join(table(config)).strip() + "\n"


def table(section: BaseModel, prefix: str = "") -> list[str]:
    """Lines of a section whose tables are named `prefix` and its own names (`stages.` for those of a list's table)."""
    lines: list[str] = []
    _write_table(section, prefix, lines)
    return lines


def _write_table(section: BaseModel, prefix: str, lines: list[str]) -> None:
    nested: list[tuple[str, BaseModel]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            nested.append((f"{prefix}{name}", value))
        elif value is not None:
            lines += [f"# {field.description}", f"{name} = {toml_value(plain(value))}"]
    for path, value in nested:
        lines += ["", f"[{path}]"]
        _write_table(value, f"{path}.", lines)


def toml_value(value: Any) -> str:
    """A plain value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_escaped(character) for character in value) + '"'
    if isinstance(value, float):
        text = repr(value)
        return text if any(c in text for c in ".en") else text + ".0"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
    return str(value)


def _escaped(character: str) -> str:
    short = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}.get(character)
    is_control = character < " " or character == "\x7f"
    return short or (f"\\u{ord(character):04x}" if is_control else character)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Cannot read the recipe {path}: {error.strerror or error}. Check the path; recipes/ holds examples."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}). Correct that line.") from error


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping) and isinstance(into.get(key), list) and all(k.isdigit() for k in value):
            for index, part in value.items():
                _merge_item(into[key], key, int(index), part)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _merge_item(items: list[Any], name: str, index: int, new: Any) -> None:
    if index >= len(items):
        raise ConfigError(
            f"--set names {name}.{index}, but there are {len(items)} {name}, counted from 0. Correct the number."
        )
    if isinstance(new, Mapping) and isinstance(items[index], dict):
        _merge(items[index], new)
    else:
        items[index] = new


def _suggestion(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] | None = kind
    for part in location[:-1]:
        if section is None or not isinstance(part, str) or part not in section.model_fields:
            return ""
        annotation = section.model_fields[part].annotation
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else f" (settings there: {', '.join(names)})" if names else ""
