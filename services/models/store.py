"""How a produced model folder gets on disk: locked, atomic, and listed in a manifest that later runs check."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST_NAME = "kvbaton-model.json"

Progress = Callable[[str], None]


def print_progress(message: str) -> None:
    """Default `Progress`: one line on stderr."""
    print(message, file=sys.stderr, flush=True)


def models_root() -> Path:
    """`$XDG_CACHE_HOME/kvbaton/models`, `~/.cache` by default; the folder may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kvbaton" / "models"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a model folder: size in bytes, hex sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a complete folder holds, and which source and converter it came from."""

    source_sha256: str
    converter: int
    files: dict[str, FileEntry]

    @classmethod
    def of_folder(cls, folder: Path, *, source_sha256: str, converter: int) -> "Manifest":
        files = {
            path.name: FileEntry(path.stat().st_size, sha256_of(path))
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST_NAME
        }
        return cls(source_sha256, converter, files)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The folder's manifest, or None where it is missing or not one of ours."""
        try:
            raw = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
            files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            return cls(raw["source_sha256"], raw["converter"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    def defects(self, folder: Path, *, full: bool) -> list[str]:
        """Files that are missing or of another size; with `full` also those with other content (reads every byte)."""
        found: list[str] = []
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != entry.size:
                found.append(f"{name} has {path.stat().st_size} bytes instead of {entry.size}")
            elif full and sha256_of(path) != entry.sha256:
                found.append(f"{name} has another sha256")
        return found


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(folder: Path, progress: Progress) -> Generator[None]:
    """Hold the lock of `folder` between processes. The kernel releases it when the holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process is preparing {folder.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(folder: Path) -> Generator[Path]:
    """A temporary sibling that takes `folder`'s place when the block ends well and is deleted otherwise.

    Call it with `exclusive` held: leftovers of killed runs are removed first. A reader sees the old folder, for an
    instant none, then the complete new one.
    """
    prefix = f".{folder.name}.partial-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            folder.rename(partial.with_name(f"{partial.name}-old"))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(partial.with_name(f"{partial.name}-old"), ignore_errors=True)
