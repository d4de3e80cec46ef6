"""What a `--model-path` stands for: a known name, a folder, or a hub id; in the end always a folder on this machine."""

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from services.models import hub, smollm2
from services.models.hub import ModelResolutionError
from services.models.store import Progress, print_progress

__all__ = ["ModelResolutionError", "ResolvedModel", "content_hash", "resolve_model_path", "wait_for_model"]

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model folder that exists.

    `name_hint` is a name to serve it under; `revision` tells two models of one name apart: the hub's commit, or
    `content_hash` of a local folder.
    """

    path: Path
    name_hint: str
    revision: str


def resolve_model_path(spec: str, *, progress: Progress = print_progress) -> ResolvedModel:
    """Return the folder of `spec`: a known name (`smollm2`), a folder, a hub id `org/name[@revision]`; in this order.

    Blocks for as long as a conversion or download takes, so call it before the event loop starts. Honours `HF_TOKEN`,
    `HF_HOME` and `HF_HUB_OFFLINE`. Raises `ModelResolutionError`.
    """
    found = _without_hub(spec, progress)
    if isinstance(found, ResolvedModel):
        return found
    return _from_hub(spec, hub.download(found["repo"], found["revision"], progress))


def wait_for_model(spec: str, *, timeout: float, progress: Progress = print_progress) -> ResolvedModel:
    """As `resolve_model_path`, for a process that must not download: it waits `timeout` seconds for another to do so.

    The others are node ranks above 0 of one engine, and HF_HOME is a folder that they share with rank 0.
    """
    found = _without_hub(spec, progress)
    if isinstance(found, ResolvedModel):
        return found
    folder = hub.wait_for_download(found["repo"], found["revision"], timeout=timeout, progress=progress)
    return _from_hub(spec, folder)


def _without_hub(spec: str, progress: Progress) -> ResolvedModel | re.Match[str]:
    """The model, or the parts of a hub id."""
    if spec == smollm2.NAME:
        return _known_model(progress)
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        return _local_folder(folder)
    hub_id = _HUB_ID.fullmatch(spec)
    if hub_id is None or spec.startswith((".", "~", "/")):
        raise ModelResolutionError(
            f"--model-path {spec}: no such folder, and neither a known model ({smollm2.NAME}) nor a hub id (org/name)"
        )
    return hub_id


def content_hash(path: Path) -> str:
    """Hex sha256 over config.json and the header of every safetensors file; milliseconds, whatever the model's size.

    The weights themselves are not read: two fine-tunes with tensors of the same names, types and shapes have the same
    hash. Raises `ModelResolutionError` where a file is not what its name says.
    """
    digest = hashlib.sha256()
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    for file in files:
        content = _safetensors_header(file) if file.suffix == ".safetensors" else file.read_bytes()
        digest.update(f"{file.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _safetensors_header(file: Path) -> bytes:
    """The JSON between the 8-byte little-endian length and the tensors (safetensors format)."""
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = opened.read(length) if 0 < length <= _MAX_SAFETENSORS_HEADER else b""
    if not header or len(header) != length:
        raise ModelResolutionError(f"{file} is not a safetensors file (a Git LFS pointer, or an interrupted download?)")
    return header


def _known_model(progress: Progress) -> ResolvedModel:
    try:
        path = smollm2.fetch(progress=progress)
    except (smollm2.ModelConversionError, ImportError, OSError) as error:
        raise ModelResolutionError(f"--model-path {smollm2.NAME}: {error}") from error
    return ResolvedModel(path, smollm2.NAME, content_hash(path))


def _local_folder(folder: Path) -> ResolvedModel:
    path = folder.resolve()
    if not (path / "config.json").is_file():
        raise ModelResolutionError(f"--model-path {folder}: the folder has no config.json, so it holds no model")
    return ResolvedModel(path, path.name, content_hash(path))


def _from_hub(spec: str, folder: Path) -> ResolvedModel:
    if not (folder / "config.json").is_file():
        raise ModelResolutionError(f"--model-path {spec}: the repository has no config.json, so it holds no model")
    return ResolvedModel(folder, spec.partition("@")[0], folder.name)  # the cache names a snapshot after its commit
