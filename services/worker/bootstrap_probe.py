"""Whether SGLang's bootstrap server answers at an address. It speaks HTTP; only its /health is used."""

from __future__ import annotations

import asyncio

from kvbaton.v1 import worker_pb2
from services.transport import join_host_port

_REQUEST = "GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"


async def bootstrap_answers(endpoint: worker_pb2.BootstrapEndpoint, *, timeout: float) -> str | None:
    """None when it answers 200 within `timeout` seconds, else what went wrong."""
    address = join_host_port(endpoint.host, endpoint.port)
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(endpoint.host.strip("[]"), endpoint.port)
            try:
                writer.write(_REQUEST.format(address=address).encode())
                await writer.drain()
                status = (await reader.readline()).decode("latin-1").strip()
            finally:
                writer.close()
    except TimeoutError:
        return f"{address} does not answer within {timeout:g} s"
    except (OSError, ValueError) as error:  # ValueError: a line without end
        return f"{address}: {error}"
    return None if " 200 " in f"{status} " else f"{address} answers {status!r}"
