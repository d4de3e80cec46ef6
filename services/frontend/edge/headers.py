"""Request headers of the generating routes that say what OpenAI's bodies have no field for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header

from services.frontend.edge.calls import HEADER_OF
from services.frontend.edge.outputs import Work
from services.registry.records import LABEL

RequestIdHeader = Annotated[
    str | None, Header(description="The request's id, for Abort and for logs; no two live requests may share it.")
]


@dataclass(frozen=True, slots=True)
class WorkerHints:
    """The workers that must run the request; empty where the frontend chooses."""

    prefill: str
    decode: str

    def named_by(self, work: Work) -> Work:
        """The same work, on these workers."""
        for call in work.calls:
            call.request.prefill_worker, call.request.decode_worker = self.prefill, self.decode
        return work


def _instance_id(field: str, description: str) -> Any:
    """The header that stands for this field of a request."""
    return Header(alias=HEADER_OF[field], pattern=f"^({LABEL.pattern})$", description=description)


def _worker_hints(
    prefill: Annotated[
        str, _instance_id("prefill_worker", "Instance id of the prefill worker that must run the request.")
    ] = "",
    decode: Annotated[
        str,
        _instance_id(
            "decode_worker", "Instance id of the decode worker, or the aggregated one, that must run the request."
        ),
    ] = "",
) -> WorkerHints:
    return WorkerHints(prefill, decode)


WorkerHeaders = Annotated[WorkerHints, Depends(_worker_hints)]
