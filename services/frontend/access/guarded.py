"""The frontend's services as the owner of a key sees them: its models, and its own requests to abort."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvbaton.errors import cancelled
from kvbaton.v1 import embed_pb2, generate_pb2, model_pb2, text_pb2
from services.early_aborts import EarlyAborts
from services.frontend.access.gate import Admission, current_admission, require_model
from services.frontend.embedding.service import Embedding
from services.frontend.request.api import Generation, LiveRequest
from services.modes import EMBED, GENERATE
from services.telemetry.tracing import NO_HEADERS


class GuardedGeneration:
    """Implements `Generation`. Where no key was asked for (health checks) it is the inner one."""

    def __init__(self, inner: Generation) -> None:
        self._inner = inner
        # Who sent each request that lives, by its id.
        self._owners: dict[str, str] = {}
        # By caller and id: nobody's abort may wait for another caller's request.
        self._early_aborts = EarlyAborts()

    @property
    def draining(self) -> bool:
        """See `Generation`."""
        return self._inner.draining

    def models(self) -> list[model_pb2.ModelInfo]:
        """Those that the caller may use."""
        admission, models = current_admission(), self._inner.models()
        if admission is None:
            return models
        return [info for info in models if admission.caller.may_use(info.model.name)]

    async def submit(
        self, request: generate_pb2.GenerateRequest, trace_headers: Mapping[str, str] = NO_HEADERS
    ) -> LiveRequest:
        """As `Generation`; PERMISSION_DENIED for a model that the caller may not use."""
        require_model(request.model, _served(self._inner, GENERATE))
        self._refuse_aborted(request.request_id)
        # Also before it is accepted: it can be aborted while its prompt is being tokenized.
        self._belongs(request.request_id)
        live = await self._inner.submit(request, trace_headers)
        self._belongs(live.request_id)
        return live

    async def tokenize(self, request: text_pb2.TokenizeRequest) -> text_pb2.TokenizeResponse:
        """As `Generation`; PERMISSION_DENIED for a model that the caller may not use."""
        require_model(request.model, _served(self._inner, GENERATE, EMBED))
        return await self._inner.tokenize(request)

    async def detokenize(self, request: text_pb2.DetokenizeRequest) -> text_pb2.DetokenizeResponse:
        """As `Generation`; PERMISSION_DENIED for a model that the caller may not use."""
        require_model(request.model, _served(self._inner, GENERATE, EMBED))
        return await self._inner.detokenize(request)

    def abort(self, request_id: str) -> bool:
        """As `Generation`; a request that lives under another key isn't there."""
        admission = current_admission()
        if self._may_abort(admission, request_id):
            return self._inner.abort(request_id)
        if admission is not None:
            self._early_aborts.remember(_own_id(admission, request_id))
        return False

    def abort_live(self, request_id: str) -> bool:
        """As `abort`, but an id that isn't there is not remembered."""
        return self._may_abort(current_admission(), request_id) and self._inner.abort_live(request_id)

    def _may_abort(self, admission: Admission | None, request_id: str) -> bool:
        return admission is None or self._owners.get(request_id) == admission.caller.name

    def _refuse_aborted(self, request_id: str) -> None:
        admission = current_admission()
        if admission is None or request_id in self._owners:
            return  # an id that lives is refused as a duplicate, and that forgets no abort
        if self._early_aborts.claim(_own_id(admission, request_id)):
            raise cancelled()

    def _belongs(self, request_id: str) -> None:
        admission = current_admission()
        if admission is not None and request_id and request_id not in self._owners:
            self._owners[request_id] = admission.caller.name
            admission.at_end.callback(self._owners.pop, request_id, None)


class GuardedEmbedding:
    """Implements `Embedding`; `generation` says which models there are."""

    def __init__(self, inner: Embedding, generation: Generation) -> None:
        self._inner = inner
        self._generation = generation

    async def embed(self, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        """As `Embedding`; PERMISSION_DENIED for a model that the caller may not use."""
        require_model(request.model, _served(self._generation, EMBED))
        return await self._inner.embed(request)


def _own_id(admission: Admission, request_id: str) -> str:
    return f"{admission.caller.name} {request_id}"  # no key's name has a space


def _served(generation: Generation, *rpcs: str) -> Iterator[str]:
    """Only looked at where the request names no model."""
    for info in generation.models():
        if any(rpc in info.rpcs for rpc in rpcs):
            yield info.model.name
