"""The files of a model folder that turn text into tokens and back, with digests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

# In the order in which GetTokenizer sends them.
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """One file; `size` in bytes."""

    path: Path
    size: int
    sha256: str


def find_tokenizer_files(model_path: Path) -> tuple[TokenizerFile, ...]:
    """The tokenizer's files, or none when the folder has no tokenizer.json."""
    if not (model_path / "tokenizer.json").is_file():
        return ()
    paths = (model_path / name for name in _NAMES)
    return tuple(_described(path) for path in paths if path.is_file())


def digest(files: tuple[TokenizerFile, ...]) -> str:
    """Over names and contents, 64 hex digits; empty without files."""
    if not files:
        return ""
    combined = hashlib.sha256()
    for file in files:
        combined.update(f"{file.path.name}\0{file.sha256}\0".encode())
    return combined.hexdigest()


def _described(path: Path) -> TokenizerFile:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return TokenizerFile(path, path.stat().st_size, sha256)
