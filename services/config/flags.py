"""Turns the fields of a frozen dataclass into command-line flags and environment variables.

Precedence: flag, then environment (KVBATON_ and the flag's name), then the field's default. A value that doesn't parse,
from either place, is a ConfigError that names the flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

ENV_PREFIX = "KVBATON_"
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class ConfigError(Exception):
    """A flag or variable can't be used; the message names it."""


def flag(default: Any, help: str) -> Any:
    """A dataclass field with its command-line help. A Literal type lists the values that the flag takes."""
    return dataclasses.field(default=default, metadata={"help": help})


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
            parser.add_argument(option, dest=field.name, default=None, help=help_text, metavar=_metavar(kind))


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
            values[field.name] = raw if isinstance(raw, bool) else _parse(kind, raw, source)
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


def _parse(kind: Any, raw: str, source: str) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if raw not in choices:
            raise ConfigError(f"{source}: {raw!r} is not one of {', '.join(choices)}")
        return raw
    try:
        return _PARSERS[kind](raw)
    except ValueError as error:
        raise ConfigError(f"{source}: {raw!r} is not {_metavar(kind).lower()}: {error}") from error


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


def _flag_name(field: dataclasses.Field[Any]) -> str:
    return field.name.replace("_", "-")


def _env_name(field: dataclasses.Field[Any]) -> str:
    return ENV_PREFIX + _flag_name(field).replace("-", "_").upper()


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "BOOLEAN"}.get(kind, "TEXT")


def _shown(default: Any) -> str:
    return "none" if default is None or default == "" else str(default)
