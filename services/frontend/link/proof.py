"""Proves that a worker has let go of a leg whose stream broke.

Until then its engine may still write KV pages into the other leg's memory.
"""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import structlog

from kvbaton.v1 import generate_pb2, generate_pb2_grpc

log = structlog.get_logger()

# Seconds until a leg whose end can't be proven counts as ended all the same.
RELEASE_DEADLINE = 30.0
# Seconds for one question, and between two.
CALL_TIMEOUT = 2.0
_ASK_AGAIN = 0.2


async def prove_ended(stub: generate_pb2_grpc.GenerateServiceAsyncStub, request_id: str, *, worker: str) -> None:
    """Returns once the worker says that it doesn't have the leg, or nobody listens at its address any more.

    A process that is only frozen, or behind a broken network, proves nothing. After RELEASE_DEADLINE its legs count as
    ended all the same.
    """
    request = generate_pb2.AbortRequest(request_id=request_id)
    try:
        async with asyncio.timeout(RELEASE_DEADLINE):
            while True:
                try:
                    if not (await stub.Abort(request, timeout=CALL_TIMEOUT)).found:
                        return
                except grpc.aio.AioRpcError as error:
                    if "Connection refused" in (error.details() or ""):
                        return
                await asyncio.sleep(_ASK_AGAIN)
    except TimeoutError:
        log.warning("a leg's end is not proven", worker=worker, request_id=request_id, seconds=RELEASE_DEADLINE)
    except grpc.aio.UsageError:
        return  # the channel is closed: the worker is withdrawn or replaced
