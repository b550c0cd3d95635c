"""Recipes as TOML files: layered left to right, then `--set a.b=c`; checked, and written out again."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rorqual.errors import ConfigError
from rorqual.train.config import TrainConfig
from rorqual.train.settings import plain


def load_config(recipes: Sequence[str | Path] = (), settings: Iterable[str] = ()) -> TrainConfig:
    """Read recipes (later ones win, key by key) and apply `a.b=c` settings.

    A setting's value is read as TOML where it is TOML (`1e-3`, `true`, `[1, 2]`) and as text otherwise.
    Raises: ConfigError for an unreadable file, an unknown key or a bad value, naming each.
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
    return validate(tree)


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """A checked config from nested plain values. Raises ConfigError listing every fault by dotted name."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            if fault["type"] == "extra_forbidden":
                lines.append(f"  {name}: there is no such setting{_suggestion(fault['loc'])}")
            else:
                lines.append(f"  {name}: {fault['msg']} (got {fault['input']!r})")
        raise ConfigError(
            "The training config cannot be used:\n" + "\n".join(lines) + "\n"
            "Correct the recipe or the --set option; `rorqual train --show-config` prints every setting "
            "with its meaning."
        ) from None


def run_recipe(config: TrainConfig) -> str:
    """The recipe a run folder keeps: all settings but `run.max_steps`, which is for one sitting only."""
    return to_toml(config.model_copy(update={"run": config.run.model_copy(update={"max_steps": None})}))


def to_toml(config: TrainConfig) -> str:
    """The config as a TOML recipe, every field under its description. Fields that are unset are left out."""
    lines: list[str] = []
    _write_table(config, "", lines)
    return "\n".join(lines).strip() + "\n"


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
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _suggestion(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] | None = TrainConfig
    for part in location[:-1]:
        if section is None or not isinstance(part, str) or part not in section.model_fields:
            return ""
        annotation = section.model_fields[part].annotation
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else f" (settings there: {', '.join(names)})" if names else ""
