"""Which contract each role has: where the prefill and decode services meet the worker that hosts them."""

from __future__ import annotations

from services.decode.contract import AggregatedContract, DecodeContract
from services.decode.peers import PrefillPeers
from services.prefill.contract import PrefillContract
from services.registry.etcd import EtcdClient
from services.requests import Role
from services.worker.role import RoleContract


def contract_of(role: Role, etcd: EtcdClient, namespace: str) -> RoleContract:
    """The contract of a worker of that role and namespace."""
    if role is Role.PREFILL:
        return PrefillContract()
    if role is Role.DECODE:
        return DecodeContract(PrefillPeers.of(etcd, namespace))
    return AggregatedContract()
