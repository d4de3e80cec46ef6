"""Models of the hub: downloaded once, waited for by other node ranks, and a clear word where that can't be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import COMMIT, REPO, FakeHub

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CONFIG, TENSORS = b'{"model_type": "llama"}', b"\x02\0\0\0\0\0\0\0{}"
FILES = {"config.json": CONFIG, "model.safetensors": TENSORS, "tokenizer.json": b"{}", "pytorch_model.bin": b"pickle"}

PROGRAM = """
import sys
from services.models.resolve import ModelResolutionError, resolve_model_path, wait_for_model
def tell(text): print("progress:", text, flush=True)
try:
    spec, seconds = sys.argv[1], float(sys.argv[2])
    model = wait_for_model(spec, timeout=seconds, progress=tell) if seconds else resolve_model_path(spec, progress=tell)
    print("model:", model.name_hint, model.revision, model.path)
except ModelResolutionError as error:
    print("error:", error)
"""


def start(home: Path, endpoint: str, spec: str = REPO, wait: float = 0.0, **environ: str) -> subprocess.Popen[str]:
    """A process of its own: huggingface_hub reads its environment once, when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, spec, str(wait)],
        cwd=ROOT,
        env=inherited | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def resolve(home: Path, endpoint: str, spec: str = REPO, wait: float = 0.0, **environ: str) -> str:
    """What it says last."""
    with start(home, endpoint, spec, wait, **environ) as process:
        return process.communicate(timeout=60)[0].splitlines()[-1]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(dict(FILES)) as hub:
        yield hub


NOWHERE = "http://127.0.0.1:9"


class TestDownload:
    def test_a_hub_id_is_downloaded_once(self, hub: FakeHub, tmp_path: Path) -> None:
        first = resolve(tmp_path, hub.endpoint)
        assert first.startswith(f"model: {REPO} {COMMIT} ")
        assert sorted(hub.downloads) == ["config.json", "model.safetensors", "tokenizer.json"], "no pickles"
        assert resolve(tmp_path, hub.endpoint) == first
        assert len(hub.downloads) == 3

    def test_pickles_are_taken_where_there_is_nothing_better(self, hub: FakeHub, tmp_path: Path) -> None:
        del hub.files["model.safetensors"]
        assert resolve(tmp_path, hub.endpoint).startswith("model:")
        assert "pytorch_model.bin" in hub.downloads

    def test_progress_is_told(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.files["model.safetensors"] = TENSORS + bytes(3_000_000)
        with start(tmp_path, hub.endpoint) as process:
            told = process.communicate(timeout=60)[0]
        assert f"progress: {REPO}: looking for it" in told
        assert "MB" in told
        assert f"progress: {REPO}: ready in " in told

    def test_a_private_repository_needs_the_token(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.token = "hf_x"
        refused = resolve(tmp_path, hub.endpoint)
        assert refused == f"error: --model-path {REPO}: not on the hub, or private and HF_TOKEN is unset"
        assert resolve(tmp_path, hub.endpoint, HF_TOKEN="hf_x").startswith("model:")

    def test_a_repository_that_does_not_exist(self, hub: FakeHub, tmp_path: Path) -> None:
        assert "org/none: not on the hub" in resolve(tmp_path, hub.endpoint, "org/none")

    def test_what_is_in_the_cache_needs_no_hub(self, hub: FakeHub, tmp_path: Path) -> None:
        downloaded = resolve(tmp_path, hub.endpoint)
        assert resolve(tmp_path, NOWHERE) == downloaded
        assert resolve(tmp_path, NOWHERE, HF_HUB_OFFLINE="1") == downloaded

    @pytest.mark.parametrize("offline", ["0", "1"])
    def test_an_unreachable_hub_names_the_model_and_what_to_do(self, tmp_path: Path, offline: str) -> None:
        said = resolve(tmp_path, NOWHERE, f"{REPO}@v1", HF_HUB_OFFLINE=offline)
        assert said.startswith(
            f"error: --model-path {REPO}@v1: not in the local hub cache and the hub can't be reached"
        )
        for remedy in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "local folder"):
            assert remedy in said

    def test_a_download_that_breaks_off_is_no_model(self, hub: FakeHub, tmp_path: Path) -> None:
        hub.broken = frozenset({"model.safetensors"})
        hub.files["model.safetensors"] = TENSORS + bytes(1_000_000)
        said = resolve(tmp_path, hub.endpoint)
        assert said.startswith(f"error: --model-path {REPO}: ")
        hub.broken = frozenset()
        assert resolve(tmp_path, hub.endpoint).startswith("model:")

    def test_half_a_model_in_the_cache_is_no_model(self, hub: FakeHub, tmp_path: Path) -> None:
        snapshot = cache(tmp_path, {"config.json": CONFIG, "model-00001-of-00002.safetensors": TENSORS})
        said = resolve(tmp_path, NOWHERE)
        assert "model-00002-of-00002.safetensors is missing" in said
        (snapshot / "model-00002-of-00002.safetensors").write_bytes(TENSORS)
        assert resolve(tmp_path, NOWHERE).startswith("model:")


class TestOtherRanks:
    """Ranks above 0 of one engine, with the cache that they share."""

    def test_they_wait_for_rank_0_and_download_nothing(self, hub: FakeHub, tmp_path: Path) -> None:
        with start(tmp_path, hub.endpoint, wait=50.0) as waiting:
            assert waiting.stdout
            assert "waiting for node rank 0" in waiting.stdout.readline()
            assert hub.downloads == []
            downloaded = resolve(tmp_path, hub.endpoint)
            assert waiting.communicate(timeout=60)[0].splitlines()[-1] == downloaded
        assert len(hub.downloads) == 3

    def test_a_deadline_names_the_file_and_the_flag(self, tmp_path: Path) -> None:
        cache(tmp_path, {"config.json": CONFIG})
        began = time.monotonic()
        said = resolve(tmp_path, NOWHERE, wait=1.5)
        assert time.monotonic() - began < 30
        assert "--model-timeout 1.5 s (model.safetensors is missing)" in said
        assert "HF_HOME" in said

    def test_they_wait_for_the_commit_that_rank_0_will_find(self, hub: FakeHub, tmp_path: Path) -> None:
        """The complete older snapshot of the branch is not taken for it."""
        cache(tmp_path, FILES, commit="f" * 40)
        with start(tmp_path, hub.endpoint, wait=50.0) as waiting:
            assert waiting.stdout
            waiting.stdout.readline()
            threading.Timer(1.5, cache, (tmp_path, FILES)).start()
            assert COMMIT in waiting.communicate(timeout=60)[0].splitlines()[-1]

    def test_without_a_hub_the_branch_in_the_cache_counts(self, tmp_path: Path) -> None:
        cache(tmp_path, FILES, commit="f" * 40)
        assert "f" * 40 in resolve(tmp_path, NOWHERE, wait=5.0)


def cache(home: Path, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """huggingface_hub's layout on disk; `main` points at the commit. Returns the snapshot's folder."""
    repo = home / "hub" / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    return snapshot
