"""What the end of a leg in the engine is to the caller: one typed error."""

from __future__ import annotations

import grpc

from kvbaton.errors import Reason, RequestError, cancelled, invalid
from services.worker.core import WorkerCore
from services.worker.engines.protocol import EngineDeadError, EngineFinish, EngineRefusedError
from services.worker.legs import Leg


class LegErrors:
    """One worker's."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    def typed(self, error: EngineRefusedError | EngineDeadError | RequestError) -> RequestError:
        """Of what the engine raised."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, EngineRefusedError):
            if error.field:
                at_fault = invalid(error.field, str(error))
                return at_fault.with_context(leg=self._core.role, worker=self._core.instance_id)
            return self._failed(grpc.StatusCode.INVALID_ARGUMENT, Reason.ENGINE_REFUSED, str(error))
        return self._failed(grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD, str(error))

    def aborted(self, leg: Leg, finish: EngineFinish) -> RequestError:
        """Of a leg that ended with Finish.ABORT."""
        if leg.drained_out:
            return self._failed(
                grpc.StatusCode.UNAVAILABLE, Reason.SHUTTING_DOWN, "the worker shut down before the request ended"
            )
        if leg.abort_requested:
            return cancelled("aborted")
        if finish.status == 400:
            return self._failed(grpc.StatusCode.INVALID_ARGUMENT, Reason.ENGINE_REFUSED, finish.message)
        return self._failed(grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_ABORTED, finish.message, retry_after=1.0)

    def _failed(
        self, code: grpc.StatusCode, reason: Reason, message: str, retry_after: float | None = None
    ) -> RequestError:
        core = self._core
        return RequestError(code, reason, message, leg=core.role, worker=core.instance_id, retry_after=retry_after)
