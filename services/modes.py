"""The modes that a worker can run in: one table, and which of its rows a command line selects.

Everything that depends on the mode is a column here. A new mode is a new row and the module of its contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from services.requests import Role

if TYPE_CHECKING:
    from services.registry.etcd import EtcdClient
    from services.worker.role import RoleContract

Command = Literal["prefill", "decode"]
DisaggregationMode = Literal["prefill", "decode", "null"]

GENERATE = "GenerateService/Generate"
EMBED = "EmbedService/Embed"


class Probe(StrEnum):
    """What warm-up and health checks ask of the engine, on every dp rank."""

    TOKEN = "one token"
    TOKEN_WITHOUT_PEER = "one token, through SGLang's pretended bootstrap host"
    EMBEDDING = "the embedding of one token"


@dataclass(frozen=True, slots=True)
class Mode:
    """One row."""

    name: str
    summary: str

    command: Command
    """`kvbaton prefill` or `kvbaton decode`."""

    disaggregation_mode: DisaggregationMode
    embedding_worker: bool

    role: Role
    """In the registry."""

    grpc_port: int
    system_port: int

    needs: tuple[Role, ...]
    """Roles of which another worker must be there before this one can serve; published in the record."""

    has_bootstrap: bool
    """Runs SGLang's bootstrap server and publishes its address."""

    answers: bool
    """Holds prompt and answer in its KV pool, so that the pool bounds the published context length."""

    probe: Probe

    rpc: str
    """Where requests come in."""

    make_contract: Callable[[EtcdClient, str], RoleContract]
    """What the mode asks of a request and of a worker that is ready, given etcd and the namespace."""

    engine_fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of SGLang's configuration that make an engine of this mode."""

    @property
    def disaggregated(self) -> bool:
        """Hands KV caches over, or receives them."""
        return self.disaggregation_mode != "null"

    @property
    def selected_by(self) -> str:
        """The command line that selects the mode."""
        default = self.disaggregation_mode == self.command
        flags = [
            "" if default or self.embedding_worker else f"--disaggregation-mode {self.disaggregation_mode}",
            "--embedding-worker" if self.embedding_worker else "",
        ]
        return " ".join(filter(None, ["kvbaton", self.command, *flags]))


def _prefill(_etcd: EtcdClient, _namespace: str) -> RoleContract:
    from services.prefill.contract import PrefillContract

    return PrefillContract()


def _decode(etcd: EtcdClient, namespace: str) -> RoleContract:
    from services.decode.contract import DecodeContract
    from services.decode.peers import PrefillPeers

    return DecodeContract(PrefillPeers.of(etcd, namespace))


def _aggregated(_etcd: EtcdClient, _namespace: str) -> RoleContract:
    from services.decode.contract import AggregatedContract

    return AggregatedContract()


def _embedding(_etcd: EtcdClient, _namespace: str) -> RoleContract:
    from services.embedding.contract import EmbeddingContract

    return EmbeddingContract()


# A command's first row is what it runs without further flags.
MODES = (
    Mode(
        name="prefill",
        summary="computes KV caches and hands them to decode workers",
        command="prefill",
        disaggregation_mode="prefill",
        embedding_worker=False,
        role=Role.PREFILL,
        grpc_port=50061,
        system_port=8081,
        needs=(Role.DECODE,),
        has_bootstrap=True,
        answers=False,
        probe=Probe.TOKEN_WITHOUT_PEER,
        rpc=GENERATE,
        make_contract=_prefill,
        engine_fields={"disaggregation_mode": "prefill"},
    ),
    Mode(
        name="decode",
        summary="generates from the KV caches of prefill workers",
        command="decode",
        disaggregation_mode="decode",
        embedding_worker=False,
        role=Role.DECODE,
        grpc_port=50062,
        system_port=8082,
        needs=(Role.PREFILL,),
        has_bootstrap=False,
        answers=True,
        probe=Probe.TOKEN_WITHOUT_PEER,
        rpc=GENERATE,
        make_contract=_decode,
        engine_fields={"disaggregation_mode": "decode"},
    ),
    Mode(
        name="aggregated",
        summary="both phases in one engine",
        command="decode",
        disaggregation_mode="null",
        embedding_worker=False,
        role=Role.AGGREGATED,
        grpc_port=50062,
        system_port=8082,
        needs=(),
        has_bootstrap=False,
        answers=True,
        probe=Probe.TOKEN,
        rpc=GENERATE,
        make_contract=_aggregated,
        engine_fields={"disaggregation_mode": "null"},
    ),
    Mode(
        name="embedding",
        summary="one vector per text",
        command="decode",
        disaggregation_mode="null",
        embedding_worker=True,
        role=Role.EMBEDDING,
        grpc_port=50063,
        system_port=8083,
        needs=(),
        has_bootstrap=False,
        answers=False,
        probe=Probe.EMBEDDING,
        rpc=EMBED,
        make_contract=_embedding,
        engine_fields={"disaggregation_mode": "null", "is_embedding": True},
    ),
)


def select_mode(command: Command, disaggregation_mode: DisaggregationMode | None, embedding_worker: bool) -> Mode:
    """The row of a command and its flags; None means that the flag is not given. Raises ValueError naming the flags."""
    rows = [mode for mode in MODES if mode.command == command and mode.embedding_worker == embedding_worker]
    if not rows:
        raise ValueError(f"--embedding-worker is not for `kvbaton {command}`")
    fitting = [mode for mode in rows if disaggregation_mode in (None, mode.disaggregation_mode)]
    if not fitting:
        taken = ", ".join(mode.disaggregation_mode for mode in rows)
        who = "--embedding-worker" if embedding_worker else f"`kvbaton {command}`"
        raise ValueError(f"--disaggregation-mode {disaggregation_mode} contradicts {who}, which takes {taken}")
    return fitting[0]


def mode_of(role: Role) -> Mode:
    """The row of a role."""
    return next(mode for mode in MODES if mode.role is role)


def contract_of(role: Role, etcd: EtcdClient, namespace: str) -> RoleContract:
    """The contract of a worker of that role and namespace."""
    return mode_of(role).make_contract(etcd, namespace)
