"""The YAML file of `--config`: one section of it, as keys and values whose types are not checked yet."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A section of a file. Keys are flag names without dashes in front; `_` counts as `-`."""

    path: Path
    section: str
    values: Mapping[str, Any]

    def where(self, key: str) -> str:
        """The key as errors and dumps name it."""
        return f"{self.path}: {self.section}.{key}" if self.section else f"{self.path}: {key}"

    def without(self, known: Iterable[str]) -> ConfigFile:
        """What is left when the `known` keys are taken out."""
        taken = set(known)
        return ConfigFile(self.path, self.section, {k: v for k, v in self.values.items() if k not in taken})

    def require_empty(self, known: Iterable[str]) -> None:
        """Raises ConfigError for keys that nobody took; `known` are those that it could have had."""
        for key in self.values:
            similar = difflib.get_close_matches(key, list(known), n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ConfigError(f"{self.where(key)}: there is no such setting{hint}")


def read_config_file(path: Path, section: str = "") -> ConfigFile:
    """The mapping under `section` (`a.b.c`) of a YAML file; the whole file when it is empty. Raises ConfigError."""
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from error
    values = _section(content, path, section)
    normalized: dict[str, Any] = {}
    for raw, value in values.items():
        key = str(raw).replace("_", "-")
        if key in normalized:
            raise ConfigError(f"{path}: {key} stands there twice, with dashes and with underscores")
        normalized[key] = value
    return ConfigFile(path, section, normalized)


def parse_yaml(text: str) -> Any:
    """The value of one document; equal keys in a mapping are refused. Raises ValueError."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _section(content: Any, path: Path, section: str) -> Mapping[Any, Any]:
    found: Any = {} if content is None else content
    walked = ""
    for name in filter(None, section.split(".")):
        keys = list(found) if isinstance(found, dict) else []
        if name not in keys:
            below = f" below {walked}" if walked else ""
            there = ", ".join(map(str, keys)) or "none"
            raise ConfigError(f"--config-key {section}: {path} has no {name}{below}; the keys there are: {there}")
        found = found[name]
        walked = f"{walked}.{name}" if walked else name
    if not isinstance(found, dict):
        what = f"--config-key {section}: {path}: what is there" if section else f"--config {path}: the file"
        raise ConfigError(f"{what} is {describe(found)} and not a mapping of flags to values")
    return found


def describe(value: Any) -> str:
    """A YAML value's type, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return "nothing" if value is None else names.get(type(value), "a mapping" if isinstance(value, dict) else "a date")


def _loader() -> Any:
    """SafeLoader, which takes the last of two equal keys, made to refuse them."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
