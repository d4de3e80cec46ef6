"""Why a stream broke, and whose cancellation it was."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from services.frontend.link.broken import STREAM_BROKE, why_broken


def test_grpcs_own_words() -> None:
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "Socket closed")
    assert why_broken(error) == "UNAVAILABLE Socket closed"


async def test_a_cancellation_by_grpc_is_a_broken_stream() -> None:
    async def read() -> str:
        try:
            raise asyncio.CancelledError
        except STREAM_BROKE as error:
            return why_broken(error)

    assert await asyncio.create_task(read()) == "the stream was cancelled"


async def test_the_readers_own_cancellation_goes_on() -> None:
    async def read() -> str:
        try:
            await asyncio.Event().wait()
        except STREAM_BROKE as error:
            return why_broken(error)
        return ""

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
