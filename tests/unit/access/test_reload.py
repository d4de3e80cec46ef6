"""A new file counts without a restart; one that can't be used changes nothing and says so once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from kvbaton.errors import RequestError
from services.frontend.access import reload
from services.frontend.access.keys import KeyFileError, as_entry, digest_of
from services.frontend.access.reload import KeyFile
from tests.support.waiting import eventually

ERROR = "error"


def content(**secrets: str) -> str:
    return "".join(as_entry(name, digest_of(secret.encode())) for name, secret in secrets.items())


def overwrite(path: Path, text: str) -> None:
    path.write_text(text)


def put(path: Path, text: str) -> None:
    """In one step: nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def opens(file: KeyFile, secret: str) -> bool:
    try:
        file.gate.identify(f"Bearer {secret}".encode())
    except RequestError:
        return False
    return True


async def soon(condition: Callable[[], bool]) -> None:
    await eventually(condition, within=5.0, what="the new keys")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(content(alice="kvb-1"))
    return path


def test_a_file_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="absent"):
        KeyFile(tmp_path / "absent")


async def test_a_file_that_was_written(path: Path) -> None:
    async with KeyFile(path, poll_seconds=0.02) as file:
        assert opens(file, "kvb-1")
        overwrite(path, content(alice="kvb-2", bob="kvb-3"))
        await soon(lambda: opens(file, "kvb-3"))
        assert opens(file, "kvb-2")
        assert not opens(file, "kvb-1")


async def test_a_file_that_was_moved_into_place(path: Path) -> None:
    async with KeyFile(path, poll_seconds=0.02) as file:
        put(path, content(alice="kvb-2"))
        await soon(lambda: opens(file, "kvb-2"))


async def test_a_kubernetes_secret_that_was_replaced(tmp_path: Path) -> None:
    """keys.yaml -> ..data/keys.yaml, ..data -> a folder of its own for each version, and only ..data changes."""
    for version, secret in (("..v1", "kvb-1"), ("..v2", "kvb-2")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.yaml").write_text(content(alice=secret))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    async with KeyFile(tmp_path / "keys.yaml", poll_seconds=0.02) as file:
        assert opens(file, "kvb-1")
        (tmp_path / "..new").symlink_to("..v2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        await soon(lambda: opens(file, "kvb-2"))


@pytest.mark.parametrize("spoil", [lambda p: put(p, "- name: alice\n"), lambda p: p.unlink()])
async def test_an_invalid_file_keeps_the_old_keys_and_is_logged_once(path: Path, spoil: Callable[[Path], Any]) -> None:
    with capture_logs() as logs:
        async with KeyFile(path, poll_seconds=0.02) as file:
            spoil(path)
            await soon(lambda: any(line["log_level"] == ERROR for line in logs))
            await asyncio.sleep(0.2)
            assert opens(file, "kvb-1")
            put(path, content(alice="kvb-2"))
            await soon(lambda: opens(file, "kvb-2"))
    (complaint,) = [line for line in logs if line["log_level"] == ERROR]
    assert complaint["event"] == "api keys not changed: the new file can't be used"
    assert str(path) in complaint["error"]


async def test_it_is_read_at_once_when_asked(path: Path) -> None:
    async with KeyFile(path, poll_seconds=3600.0) as file:
        put(path, content(alice="kvb-2"))
        file.reload()
        await soon(lambda: opens(file, "kvb-2"))


async def test_the_file_is_watched_on_after_an_error_that_nobody_foresaw(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Path) -> Any:
        raise RuntimeError("unforeseen")

    with capture_logs() as logs:
        async with KeyFile(path, poll_seconds=0.02) as file:
            with monkeypatch.context() as patch:
                patch.setattr(reload, "read_keys", failing)
                put(path, content(alice="kvb-2"))
                await soon(lambda: any(line["log_level"] == ERROR for line in logs))
            assert opens(file, "kvb-1")
            put(path, content(alice="kvb-3", bob="kvb-4"))
            await soon(lambda: opens(file, "kvb-3"))


async def test_logs_name_keys_and_hold_none(path: Path) -> None:
    with capture_logs() as logs:
        async with KeyFile(path, poll_seconds=0.02) as file:
            put(path, content(bob="kvb-2"))
            await soon(lambda: opens(file, "kvb-2"))
    assert (logs[-1]["added"], logs[-1]["removed"]) == (["bob"], ["alice"])
    assert "kvb-" not in str(logs)
    assert digest_of(b"kvb-2").hex() not in str(logs)
