"""Turns the fields of a frozen dataclass into command-line flags and environment variables.

Precedence: flag, then environment (KVBATON_ and the flag's name), then the field's default. A value that doesn't parse,
from either place, is a ConfigError that names the flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

ENV_PREFIX = "KVBATON_"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class ConfigError(Exception):
    """A flag or variable can't be used; the message names it."""


def flag(default: Any, help: str, *, name: str | None = None, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with its command-line help. `name` is the flag without dashes; default: the field's own."""
    metadata = {"help": help, "name": name, "choices": tuple(choices) if choices else None}
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type[Any]) -> Any:
    """A field that is itself a dataclass of flags, in the same flat name space."""
    return dataclasses.field(default_factory=cls, metadata={"group": True})


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds a flag for every field, groups included."""
    for field, kind in _fields(config):
        if field.metadata.get("group"):
            add_flags(parser, kind)
            continue
        option = "--" + _flag_name(field)
        help_text = f"{field.metadata['help']} [{_env_name(field)}; default: {_shown(field.default)}]".replace(
            "%", "%%"
        )
        if kind is bool:
            parser.add_argument(
                option, dest=field.name, action=argparse.BooleanOptionalAction, default=None, help=help_text
            )
        else:
            metavar = None if field.metadata["choices"] else _metavar(kind)
            parser.add_argument(option, dest=field.name, default=None, help=help_text, metavar=metavar)


def build(config: type[T], arguments: argparse.Namespace, environ: Mapping[str, str]) -> T:
    """The configuration from parsed flags and the environment. Raises ConfigError."""
    values: dict[str, Any] = {}
    for field, kind in _fields(config):
        if field.metadata.get("group"):
            values[field.name] = build(kind, arguments, environ)
            continue
        raw = getattr(arguments, field.name, None)
        source = "--" + _flag_name(field)
        if raw is None:
            raw, source = environ.get(_env_name(field)), _env_name(field)
        if raw is not None:
            values[field.name] = raw if isinstance(raw, bool) else _parse(kind, raw, source, field.metadata["choices"])
    try:
        return config(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fields(config: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(config)
    return [(field, _without_none(hints[field.name])) for field in dataclasses.fields(config) if field.metadata]


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(part for part in hint.__args__ if part is not type(None))
    return hint


def _parse(kind: Any, raw: str, source: str, choices: Sequence[str] | None) -> Any:
    if choices and raw not in choices:
        raise ConfigError(f"{source}: {raw!r} is not one of {', '.join(choices)}")
    try:
        return _PARSERS.get(kind, kind)(raw)
    except ValueError as error:
        raise ConfigError(f"{source}: {raw!r} is not {_metavar(kind).lower()}: {error}") from error


def _parse_bool(raw: str) -> bool:
    lowered = raw.lower()
    if lowered not in _TRUE | _FALSE:
        raise ValueError("write true or false")
    return lowered in _TRUE


_PARSERS: dict[Any, Callable[[str], Any]] = {bool: _parse_bool, Path: lambda raw: Path(raw).expanduser()}


def _flag_name(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata["name"] or field.name.replace("_", "-"))


def _env_name(field: dataclasses.Field[Any]) -> str:
    return ENV_PREFIX + _flag_name(field).replace("-", "_").upper()


def _metavar(kind: Any) -> str:
    return {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "BOOLEAN"}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    return "none" if default is None or default == "" else str(default)
