"""The resolved configuration: written to a file that --config reads again, and logged, both without secrets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.config.errors import ConfigError
from services.config.flags import DEFAULT
from services.config.yaml_file import ConfigFile

HIDDEN = "***"

# Whole words of a name: "tls-key" hides its value, "max-total-tokens" and "skip-tokenizer-init" don't.
_SECRET_WORDS = frozenset(
    {"token", "key", "secret", "password", "passwd", "credential", "credentials", "authorization"}
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value in force, by its YAML key; secrets are hidden already."""

    key: str
    value: Any
    source: str


def settings_of(config: Any, sources: Mapping[str, str]) -> tuple[Setting, ...]:
    """Every setting of a configuration. `sources` as in `Resolved`."""
    return tuple(_settings(config, sources))


def _settings(config: Any, sources: Mapping[str, str]) -> Iterator[Setting]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("group"):
            yield from _settings(value, sources)
        elif field.metadata:
            key = field.name.replace("_", "-")
            plain = str(value) if isinstance(value, Path) else value
            yield Setting(key, hide(key, plain), sources.get(field.name, DEFAULT))


def native_settings(arguments: Sequence[str], file: ConfigFile | None) -> tuple[Setting, ...]:
    """SGLang's own settings: a flag without value is true, one with several a list. Their types are SGLang's affair."""
    given: dict[str, list[str]] = {}
    last: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, separator, value = argument[2:].partition("=")
            last = given[name.replace("_", "-")] = [value] if separator else []
        else:
            last.append(argument)
    flags: dict[str, Any] = {
        name: True if not values else values[0] if len(values) == 1 else values for name, values in given.items()
    }
    from_file = {} if file is None else {name: value for name, value in file.values.items() if name not in flags}
    return (
        *(Setting(name, hide(name, value), f"--{name}") for name, value in flags.items()),
        *(Setting(name, hide(name, value), file.where(name) if file else "") for name, value in from_file.items()),
    )


def hide(name: str, value: Any) -> Any:
    """The value, or `***` where the name says that it is a secret; also inside mappings, JSON text and URLs."""
    if value in (None, "", True, False):
        return value
    if _SECRET_WORDS & set(re.split(r"[^a-z]+", name.lower())):
        return HIDDEN
    if isinstance(value, dict):
        return {key: hide(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [hide(name, inner) for inner in value]
    return _hide_in_text(value) if isinstance(value, str) else value


def _hide_in_text(text: str) -> str:
    if text.startswith(("{", "[")):
        try:
            return json.dumps(hide("", json.loads(text)))
        except ValueError:
            pass
    return _PASSWORD_IN_URL.sub(HIDDEN, text)


def dump(settings: Sequence[Setting], path: Path) -> None:
    """Writes YAML with the source of each value as a comment; what is hidden or unset stands there as a comment.

    Raises ConfigError.
    """
    lines = ["# The configuration in force. Give it to --config to start the same process again."]
    for setting in settings:
        text = f"{setting.key}: {_as_yaml(setting.value)}"
        unset = setting.value in (None, "") or HIDDEN in text
        lines.append(f"{'# ' if unset else ''}{text}  # {setting.source}")
    try:
        path.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--dump-config-to {path}: {error.strerror}") from error


def for_log(settings: Sequence[Setting]) -> dict[str, Any]:
    """The fields of one log event: every value, and the source of those that somebody set."""
    return {
        "values": {setting.key: setting.value for setting in settings},
        "sources": {setting.key: setting.source for setting in settings if setting.source != DEFAULT},
    }


def _as_yaml(value: Any) -> str:
    """On one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip().removesuffix("...").strip()
    return json.dumps(value) if "\n" in text else text
