"""What a `--model-path` stands for: a known name, a folder, or a hub id; in the end always a folder on this machine."""

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from services.models import smollm2
from services.models.store import Progress, print_progress

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the format's own limit

_NEVER_SERVED = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "onnx/*", "original/*")
_TORCH_PICKLES = ("*.bin", "*.pt", "*.pth")


class ModelResolutionError(Exception):
    """The model can't be had. The message names what was asked for, the cause, and what to change."""


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
    return _from_hub(hub_id["repo"], hub_id["revision"], progress)


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


def _from_hub(repo: str, revision: str | None, progress: Progress) -> ResolvedModel:
    progress(f"{repo}: looking for it in the hub's cache and on the hub")
    path = _snapshot(repo, revision, ignore=(*_NEVER_SERVED, *_TORCH_PICKLES))
    if not any(path.glob("*.safetensors")):
        path = _snapshot(repo, revision, ignore=_NEVER_SERVED)
    if not (path / "config.json").is_file():
        raise ModelResolutionError(f"--model-path {repo}: the repository has no config.json, so it holds no model")
    progress(f"{repo}: ready in {path}")
    return ResolvedModel(path, repo, path.name)  # the cache names a snapshot's folder after its commit


def _snapshot(repo: str, revision: str | None, *, ignore: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = repo if revision is None else f"{repo}@{revision}"
    try:
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=list(ignore)))
    except GatedRepoError as error:
        raise ModelResolutionError(f"--model-path {asked}: gated; accept its terms on the hub, set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelResolutionError(f"--model-path {asked}: not on the hub, or private and HF_TOKEN is unset") from error
    except RevisionNotFoundError as error:
        raise ModelResolutionError(f"--model-path {asked}: the repository has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise ModelResolutionError(
            f"--model-path {asked}: not in the local hub cache and the hub can't be reached ({_root_cause(error)}); "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelResolutionError(f"--model-path {asked}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
