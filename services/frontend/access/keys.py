"""What is an API key, and which ones does the file of --api-keys hold?

The file is a YAML list; it has digests, never keys:

    - name: team-a
      sha256: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
      requests_per_minute: 600
      concurrent_requests: 32
      models: [qwen3-8b]
"""

from __future__ import annotations

import difflib
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.config.errors import ConfigError
from services.config.yaml_file import describe, parse_yaml

KEY_PREFIX = "kvb-"
_KEY_BYTES = 32
MAX_FILE_BYTES = 4 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FIELDS = ("name", "sha256", "requests_per_minute", "concurrent_requests", "models")


class KeyFileError(ConfigError):
    """The file can't be used; the message names it, the entry and the field."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One entry. None: no limit, and every model."""

    name: str
    digest: bytes
    """SHA-256 of the key. No slow hash: a key is 256 random bits, which nobody finds by trying, and it is checked with
    every request."""
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    models: frozenset[str] | None = None


def fresh_key() -> str:
    """A new key: 256 random bits behind a prefix that secret scanners can look for."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: bytes) -> bytes:
    """What the file has of a key."""
    return hashlib.sha256(key).digest()


def check_name(name: str) -> str:
    """The name as given. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name: 1 to 64 of letters, digits, . _ @ - and no sign in front")
    return name


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The entries of the file, at least one. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"--api-keys {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"--api-keys {path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        entries = parse_yaml(content.decode())
    except ValueError as error:
        raise KeyFileError(f"--api-keys {path}: not YAML: {error}") from error
    except RecursionError as error:
        raise KeyFileError(f"--api-keys {path}: nested too deeply") from error
    return parse_keys(entries, f"--api-keys {path}")


def parse_keys(entries: Any, where: str) -> tuple[ApiKey, ...]:
    """The entries of a file's content; `where` begins every error. Raises KeyFileError."""
    if not isinstance(entries, list):
        raise KeyFileError(f"{where}: {describe(entries)} and not a list of keys")
    if not entries:
        raise KeyFileError(f"{where}: no key, so nobody could use the frontend")
    keys: list[ApiKey] = []
    for position, entry in enumerate(entries, 1):
        key = _Entry(f"{where}: entry {position}", entry).read()
        for other, earlier in enumerate(keys, 1):
            if earlier.name == key.name:
                raise KeyFileError(f"{where}: entry {position} ({key.name}): name: entry {other} has it, too")
            if earlier.digest == key.digest:
                raise KeyFileError(f"{where}: entry {position} ({key.name}): sha256: entry {other} has it, too")
        keys.append(key)
    return tuple(keys)


class _Entry:
    def __init__(self, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise KeyFileError(f"{where}: {describe(value)} and not a mapping with name and sha256")
        self._values: Mapping[Any, Any] = value
        name = value.get("name")
        self._where = f"{where} ({name})" if isinstance(name, str) and _NAME.fullmatch(name) else where

    def read(self) -> ApiKey:
        for field in self._values:
            if field not in _FIELDS:
                similar = difflib.get_close_matches(str(field), _FIELDS, n=1)
                hint = f"; did you mean {similar[0]}?" if similar else f"; there are {', '.join(_FIELDS)}"
                raise self._error(str(field), f"there is no such field{hint}")
        return ApiKey(
            name=self._name(),
            digest=self._digest(),
            requests_per_minute=self._count("requests_per_minute"),
            concurrent_requests=self._count("concurrent_requests"),
            models=self._models(),
        )

    def _name(self) -> str:
        try:
            return check_name(self._text("name"))
        except ValueError as error:
            raise self._error("name", str(error)) from error

    def _digest(self) -> bytes:
        text = self._text("sha256")
        if not _SHA256.fullmatch(text):
            # Not the value itself: it may be the key, put here by mistake.
            raise self._error("sha256", "not 64 hexadecimal digits")
        return bytes.fromhex(text)

    def _text(self, field: str) -> str:
        value = self._values.get(field)
        if value is None:
            raise self._error(field, "missing")
        if not isinstance(value, str):
            raise self._error(field, f"{describe(value)} and not text (write it in quotes)")
        return value

    def _count(self, field: str) -> int | None:
        if field not in self._values:
            return None
        value = self._values[field]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000_000:
            raise self._error(field, f"{value!r} is not a whole number of at least 1")
        return value

    def _models(self) -> frozenset[str] | None:
        if "models" not in self._values:
            return None
        value = self._values["models"]
        if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
            raise self._error("models", "not a list of at least one model's name")
        return frozenset(value)

    def _error(self, field: str, message: str) -> KeyFileError:
        return KeyFileError(f"{self._where}: {field}: {message}")


def as_entry(name: str, digest: bytes) -> str:
    """The entry in YAML, to be pasted into the file."""
    return f'- name: "{name}"\n  sha256: "{digest.hex()}"\n'


def names_of(keys: Sequence[ApiKey]) -> list[str]:
    """In the order of the file."""
    return [key.name for key in keys]
