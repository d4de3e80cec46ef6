"""One etcd for the session, one namespace and one cluster per test."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.support.cluster import FakeCluster
from tests.support.etcd import etcd_endpoint

__all__ = ["etcd_endpoint"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a byte-level tokenizer: one token per byte, 0 to 255, and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    vocabulary |= {f"<{index}>": index for index in range(len(alphabet), 1200)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="session")
def marking_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `model_folder`, with a special token that the post-processor puts before every text."""
    folder = tmp_path_factory.mktemp("marking")
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<begin>"])
    begin = tokenizer.token_to_id("<begin>")
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((model_folder / "tokenizer_config.json").read_text())
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def link() -> str:
    """How the frontend reaches workers; modules whose promises hold for every link override it with all of them."""
    return "streams"


@pytest_asyncio.fixture
async def cluster(etcd_endpoint: str, model_folder: Path, link: str) -> AsyncIterator[FakeCluster]:
    """A frontend without workers."""
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    # Everything runs in one event loop here: on a busy machine its own stalls must not pass for silent workers.
    async with FakeCluster(etcd_endpoint, namespace, model_folder, link=link, heartbeat=2.0) as cluster:
        yield cluster
