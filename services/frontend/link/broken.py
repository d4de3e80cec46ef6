"""Why a stream from a worker broke, in words."""

from __future__ import annotations

import asyncio

import grpc.aio

STREAM_BROKE = (grpc.aio.AioRpcError, asyncio.CancelledError)
"""What a reader of a stream meets when that breaks; `why_broken` says more."""


def why_broken(error: grpc.aio.AioRpcError | asyncio.CancelledError) -> str:
    """For the log. A cancellation can be gRPC's, of the call; one of the reader itself is raised again."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise error
    return "the stream was cancelled"
