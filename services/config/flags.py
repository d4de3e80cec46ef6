"""Turns the fields of a frozen dataclass into command-line flags, environment variables and YAML keys.

Precedence: flag, then environment (KVBATON_ and the flag's name), then the file of --config, then the field's default.
A value that can't be used, wherever it stands, is a ConfigError that names the place.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from services.config.errors import ConfigError
from services.config.yaml_file import ConfigFile, describe

__all__ = [
    "DEFAULT",
    "ENV_PREFIX",
    "ConfigError",
    "Option",
    "Resolved",
    "add_flags",
    "build",
    "flag",
    "group",
    "keys_of",
    "options_of",
    "resolve",
]

T = TypeVar("T")

ENV_PREFIX = "KVBATON_"
DEFAULT = "default"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def flag(default: Any, help: str, *, aliases: tuple[str, ...] = (), sglang: str = "") -> Any:
    """A dataclass field with its command-line help. A Literal type lists the values that the flag takes.

    `aliases` are further names of the flag and its YAML key. `sglang` names the field of SGLang's own configuration
    that gets the value where one is given; see `WorkerConfig.engine_fields`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "aliases": aliases, "sglang": sglang})


def group(cls: type[Any]) -> Any:
    """A field that is itself a dataclass of flags, in the same flat name space."""
    return dataclasses.field(default_factory=cls, metadata={"group": True})


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a process: what its flag, its variable and its YAML key have in common."""

    field: str
    kind: Any
    default: Any
    help: str
    aliases: tuple[str, ...] = ()
    sglang: str = ""

    @property
    def key(self) -> str:
        """In YAML; the flag without its dashes."""
        return self.field.replace("_", "-")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every YAML key that sets it, the `no-` form of a switch among them."""
        names = (self.key, *self.aliases)
        return (*names, *(f"no-{name}" for name in names)) if self.kind is bool else names

    @property
    def variable(self) -> str:
        """In the environment."""
        return ENV_PREFIX + self.field.upper()

    @property
    def metavar(self) -> str:
        """The type of the value, as help shows it."""
        if typing.get_origin(self.kind) is Literal:
            return "|".join(typing.get_args(self.kind))
        return {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "BOOLEAN"}.get(self.kind, "TEXT")

    @property
    def shown_default(self) -> str:
        """The default, in words."""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return "none" if self.default is None or self.default == "" else str(self.default)


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    """A configuration and, by field name, where each value comes from ("default" where nobody set it)."""

    config: T
    sources: Mapping[str, str]


def options_of(config: type[Any]) -> Iterator[Option]:
    """The settings of a configuration, groups included, in the order of the fields."""
    for field, kind in _fields(config):
        if field.metadata.get("group"):
            yield from options_of(kind)
        else:
            yield _option(field, kind)


def keys_of(config: type[Any]) -> frozenset[str]:
    """Every YAML key that sets something of it."""
    return frozenset(key for option in options_of(config) for key in option.keys)


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds a flag for every field, groups included."""
    for option in options_of(config):
        names = [f"--{name}" for name in (option.key, *option.aliases)]
        help_text = f"{option.help} [{option.variable}; default: {option.shown_default}]".replace("%", "%%")
        if option.kind is bool:
            parser.add_argument(
                *names, dest=option.field, action=argparse.BooleanOptionalAction, default=None, help=help_text
            )
        else:
            parser.add_argument(*names, dest=option.field, default=None, help=help_text, metavar=option.metavar)


def build(config: type[T], arguments: argparse.Namespace, environ: Mapping[str, str]) -> T:
    """The configuration from parsed flags and the environment. Raises ConfigError."""
    return resolve(config, arguments, environ).config


def resolve(
    config: type[T], arguments: argparse.Namespace, environ: Mapping[str, str], file: ConfigFile | None = None
) -> Resolved[T]:
    """The configuration from parsed flags, the environment and a file. Keys that aren't ours are no error here.

    Raises ConfigError.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field, kind in _fields(config):
        if field.metadata.get("group"):
            inner = resolve(kind, arguments, environ, file)
            values[field.name] = inner.config
            sources |= inner.sources
            continue
        found = _find(_option(field, kind), arguments, environ, file)
        if found is not None:
            values[field.name], sources[field.name] = found
        else:
            sources[field.name] = DEFAULT
    try:
        return Resolved(config(**values), sources)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _find(
    option: Option, arguments: argparse.Namespace, environ: Mapping[str, str], file: ConfigFile | None
) -> tuple[Any, str] | None:
    """The value that counts and its source, None where there is only the default."""
    source = f"--{option.key}"
    raw = getattr(arguments, option.field, None)
    if raw is None:
        raw, source = environ.get(option.variable), option.variable
    if raw is not None:
        return raw if isinstance(raw, bool) else _parse(option, raw, source), source
    keys = [] if file is None else [key for key in option.keys if key in file.values]
    if file is None or not keys:
        return None
    if len(keys) > 1:
        raise ConfigError(f"{file.where(keys[0])} and {keys[1]} are the same setting")
    where = file.where(keys[0])
    value = _from_yaml(option, file.values[keys[0]], where)
    return (not value if keys[0].startswith("no-") and option.kind is bool else value), where


def _fields(config: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(config)
    return [(field, _without_none(hints[field.name])) for field in dataclasses.fields(config) if field.metadata]


def _option(field: dataclasses.Field[Any], kind: Any) -> Option:
    metadata = field.metadata
    return Option(field.name, kind, field.default, metadata["help"], metadata["aliases"], metadata["sglang"])


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _parse(option: Option, raw: str, source: str) -> Any:
    """A value that is text: a flag's or a variable's."""
    if typing.get_origin(option.kind) is Literal:
        return _choice(option, raw, source)
    try:
        return _PARSERS[option.kind](raw)
    except ValueError as error:
        raise ConfigError(f"{source}: {raw!r} is not {option.metavar.lower()}: {error}") from error


def _from_yaml(option: Option, value: Any, where: str) -> Any:
    """A value that YAML has given a type, which must be the right one."""
    kind = option.kind
    if typing.get_origin(kind) is Literal:
        # `disaggregation-mode: null` is the absence of a value in YAML, and a value to us.
        return _choice(option, "null" if value is None else value, where)
    fits = {
        str: isinstance(value, str),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        Path: isinstance(value, str),
    }
    if not fits[kind]:
        hint = " (write it in quotes)" if kind is str and value is not None else ""
        raise ConfigError(f"{where}: {value!r} is {describe(value)} and not {_IN_WORDS[kind]}{hint}")
    return Path(str(value)).expanduser() if kind is Path else kind(value)


def _choice(option: Option, value: Any, where: str) -> Any:
    choices = typing.get_args(option.kind)
    if value not in choices:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(choices)}")
    return value


def _parse_bool(raw: str) -> bool:
    lowered = raw.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError("write true or false")
    return lowered in _TRUE


_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: _parse_bool,
    Path: lambda raw: Path(raw).expanduser(),
}

_IN_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
