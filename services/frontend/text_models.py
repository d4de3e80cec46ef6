"""Tokenizers and chat templates, fetched from the workers themselves, verified, and kept on disk by digest."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from kvbaton.v1 import model_pb2, model_pb2_grpc
from services.frontend.text.chat_template import ChatTemplate, ChatTemplateError
from services.frontend.text.tokenizer import TextTokenizer, TokenizerError
from services.models.tokenizer_files import digest, find_tokenizer_files

log = structlog.get_logger()

_FETCH_TIMEOUT = 120.0
# A worker that sends nothing for so long holds up the others of its model, who may have the same files.
_STALL_TIMEOUT = 10.0
# A tokenizer.json of a 256 k vocabulary is about 30 MB.
_MAX_FILE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TextModel:
    """What turns one model's text into tokens and back. `chat` is the reason when the model has no usable template."""

    tokenizer: TextTokenizer
    chat: ChatTemplate | ChatTemplateError


class TextModels:
    """One TextModel per tokenizer digest, shared by all workers and models that have it."""

    def __init__(self, cache_folder: Path) -> None:
        self._folder = cache_folder
        self._models: dict[str, TextModel] = {}
        # One for each digest that someone waits for; gone with the last who does.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def get(self, info: model_pb2.ModelInfo, stub: model_pb2_grpc.ModelServiceAsyncStub) -> TextModel | None:
        """From memory, from disk, or from the worker behind `stub`; None for a model without a tokenizer.

        Raises TokenizerError when what comes is not what its digest says, grpc.aio.AioRpcError, OSError.
        """
        wanted = info.tokenizer_sha256
        if not wanted:
            return None
        if wanted in self._models:
            return self._models[wanted]
        lock = self._locks.setdefault(wanted, asyncio.Lock())
        async with lock:
            if wanted not in self._models:
                folder = self._folder / wanted
                if not await asyncio.to_thread(_holds, folder, wanted):
                    await self._fetch(folder, wanted, stub)
                self._models[wanted] = await asyncio.to_thread(_load, folder)
            return self._models[wanted]

    def close(self) -> None:
        """Ends the tokenizers' threads."""
        for model in self._models.values():
            model.tokenizer.close()

    async def _fetch(self, folder: Path, wanted: str, stub: model_pb2_grpc.ModelServiceAsyncStub) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        arriving = Path(tempfile.mkdtemp(dir=self._folder, prefix=".arriving-"))
        try:
            await _receive(arriving, stub)
            if not await asyncio.to_thread(_holds, arriving, wanted):
                raise TokenizerError("the files that the worker sent don't have the digest that it announced")
            await asyncio.to_thread(_put_in_place, arriving, folder)
            log.info("tokenizer fetched", sha256=wanted)
        finally:
            await asyncio.to_thread(shutil.rmtree, arriving, ignore_errors=True)


async def _receive(folder: Path, stub: model_pb2_grpc.ModelServiceAsyncStub) -> None:
    """Writes the files of a GetTokenizer stream; digests and sizes are checked per file."""
    expected: dict[str, tuple[int, str]] = {}
    async for chunk in _chunks(stub.GetTokenizer(model_pb2.GetTokenizerRequest(), timeout=_FETCH_TIMEOUT)):
        name = chunk.file_name
        if not name or name != Path(name).name or name.startswith("."):
            raise TokenizerError(f"the worker sent a file named {name!r}")
        if chunk.offset == 0:
            expected[name] = (chunk.file_size, chunk.file_sha256)
        if name not in expected or chunk.offset + len(chunk.data) > min(expected[name][0], _MAX_FILE_BYTES):
            raise TokenizerError(f"{name}: more bytes than announced")
        with (folder / name).open("ab") as file:
            if file.tell() != chunk.offset:
                raise TokenizerError(f"{name}: chunks out of order")
            file.write(chunk.data)
    for name, (size, sha256) in expected.items():
        content = await asyncio.to_thread((folder / name).read_bytes)
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            raise TokenizerError(f"{name}: not what its digest says")


async def _chunks(
    stream: AsyncIterable[model_pb2.GetTokenizerResponse],
) -> AsyncIterator[model_pb2.GetTokenizerResponse]:
    arriving = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(_STALL_TIMEOUT):
                chunk = await anext(arriving)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise TokenizerError(f"nothing came for {_STALL_TIMEOUT:g} s") from error
        yield chunk


def _holds(folder: Path, wanted: str) -> bool:
    return folder.is_dir() and digest(find_tokenizer_files(folder)) == wanted


def _put_in_place(arriving: Path, folder: Path) -> None:
    if folder.exists():  # a damaged copy
        shutil.rmtree(folder)
    try:
        arriving.rename(folder)
    except OSError:
        if not folder.is_dir():  # another frontend was first, with the same files
            raise


def _load(folder: Path) -> TextModel:
    tokenizer = TextTokenizer(folder)
    try:
        return TextModel(tokenizer, ChatTemplate.from_folder(folder, tokenizer.special_tokens))
    except ChatTemplateError as error:
        return TextModel(tokenizer, error)
