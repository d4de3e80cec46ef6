"""Models of the Hugging Face hub: downloaded into its cache by one process, waited for by the others."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

from services.models.store import Progress

_NEVER_SERVED = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.tflite", "onnx/*", "original/*")
_TORCH_PICKLES = ("*.bin", "*.pt", "*.pth")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")

_PROGRESS_SECONDS = 5.0
_POLL_SECONDS = 1.0
_NEXT_STEP = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder"


class ModelResolutionError(Exception):
    """The model can't be had. The message names what was asked for, the cause, and what to change."""


def download(repo: str, revision: str | None, progress: Progress) -> Path:
    """The snapshot's folder, complete; its name is the commit. Honours HF_TOKEN, HF_HOME and HF_HUB_OFFLINE.

    Raises ModelResolutionError.
    """
    progress(f"{repo}: looking for it in the hub's cache and on the hub")
    path = _snapshot(repo, revision, progress, ignore=(*_NEVER_SERVED, *_TORCH_PICKLES))
    if not any(path.glob("*.safetensors")):
        path = _snapshot(repo, revision, progress, ignore=_NEVER_SERVED)
    if missing := missing_files(path):
        raise ModelResolutionError(
            f"--model-path {_asked(repo, revision)}: the hub's cache has only a part of it ({missing[0]} is missing)"
            f" and the hub can't be reached; {_NEXT_STEP}"
        )
    progress(f"{repo}: ready in {path}")
    return path


def wait_for_download(repo: str, revision: str | None, *, timeout: float, progress: Progress) -> Path:
    """The snapshot's folder once another process has completed it in the same cache; downloads nothing itself.

    Of a branch it waits for the commit that the hub names, as long as the hub answers: an older one that is complete in
    the cache is not what rank 0 is about to load. Raises ModelResolutionError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    commit = _commit_on_hub(repo, revision) or revision
    progress(f"{repo}: waiting for node rank 0 to download it")
    while True:
        path = _cached(repo, commit)
        missing = ["every file"] if path is None else missing_files(path, weights_needed=True)
        if path is not None and not missing:
            progress(f"{repo}: ready in {path}")
            return path
        if time.monotonic() >= deadline:
            raise ModelResolutionError(
                f"--model-path {_asked(repo, revision)}: not complete in the hub's cache after --model-timeout"
                f" {timeout:g} s ({missing[0]} is missing); node rank 0 downloads it, and HF_HOME must be a folder that"
                " all machines share"
            )
        time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def missing_files(folder: Path, *, weights_needed: bool = False) -> list[str]:
    """What a model folder lacks by its own account: config.json, and the weights that its indexes and shards name."""
    wanted = {"config.json"}
    for index in folder.glob("*.index.json"):
        wanted |= set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
    weights = [path.name for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin"))]
    for shard in filter(None, map(_SHARD.fullmatch, weights)):
        width, count = len(shard["number"]), int(shard["count"])
        names = (f"{shard['stem']}-{number:0{width}}-of-{shard['count']}" for number in range(1, count + 1))
        wanted |= {f"{name}{shard['suffix']}" for name in names}
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    return missing if weights or missing or not weights_needed else ["model.safetensors"]


def _snapshot(repo: str, revision: str | None, progress: Progress, *, ignore: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = _asked(repo, revision)
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, ignore_patterns=list(ignore), tqdm_class=_reporter(repo, progress)
            )
        )
    except GatedRepoError as error:
        raise ModelResolutionError(f"--model-path {asked}: gated; accept its terms on the hub, set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelResolutionError(f"--model-path {asked}: not on the hub, or private and HF_TOKEN is unset") from error
    except RevisionNotFoundError as error:
        raise ModelResolutionError(f"--model-path {asked}: the repository has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise ModelResolutionError(
            f"--model-path {asked}: not in the local hub cache and the hub can't be reached ({_root_cause(error)}); "
            f"{_NEXT_STEP}"
        ) from error
    except _connection_errors() as error:
        raise ModelResolutionError(
            f"--model-path {asked}: the download broke off ({_root_cause(error)}); start again to resume it, "
            f"or {_NEXT_STEP}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelResolutionError(f"--model-path {asked}: {_root_cause(error)}") from error


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # The same patterns as rank 0's: what it leaves out is not missing.
        ignored = [*_NEVER_SERVED, *_TORCH_PICKLES]
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=ignored, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _commit_on_hub(repo: str, revision: str | None) -> str | None:
    """The commit that a branch is at; None when the hub doesn't say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(repo, revision=revision, timeout=10.0).sha
    except (*_connection_errors(), HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None


def _connection_errors() -> tuple[type[Exception], ...]:
    """Of the HTTP library under huggingface_hub: httpx since 1.0, before that requests, whose errors are OSErrors."""
    try:
        import httpx
    except ModuleNotFoundError:
        return (ConnectionError,)
    return (httpx.TransportError, ConnectionError)


def _reporter(repo: str, progress: Progress) -> Any:
    """A tqdm that draws nothing and tells `progress` of the bytes every few seconds."""
    from huggingface_hub.utils import tqdm

    class Reporter(tqdm):  # pyright: ignore[reportUntypedBaseClass]
        _lock = threading.RLock()
        _told = 0.0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._bytes = 0
            # tqdm keeps neither when it is disabled.
            self.total: float = kwargs.get("total") or 0
            self._in_bytes = kwargs.get("unit") == "B" and not str(kwargs.get("name", "")).endswith(".transfer")

        def update(self, n: float | None = 1) -> None:
            with self._lock:
                self._bytes += int(n or 0)
                now = time.monotonic()
                if not self._in_bytes or now - Reporter._told < _PROGRESS_SECONDS:
                    return
                Reporter._told = now
                megabytes, total = self._bytes / 1e6, (self.total or 0) / 1e6
            progress(f"{repo}: {megabytes:.0f} of {total:.0f} MB")

    return Reporter


def _asked(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo}@{revision}"


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
