"""The table of modes: which command line selects which row, and what each row makes of a worker."""

from __future__ import annotations

import pytest

from services.modes import EMBED, GENERATE, MODES, Command, DisaggregationMode, Probe, mode_of, select_mode
from services.requests import Role


@pytest.mark.parametrize(
    ("command", "disaggregation_mode", "name"),
    [
        ("prefill", None, "prefill"),
        ("prefill", "prefill", "prefill"),
        ("decode", None, "decode"),
        ("decode", "decode", "decode"),
        ("decode", "null", "aggregated"),
    ],
)
def test_selection(command: Command, disaggregation_mode: DisaggregationMode | None, name: str) -> None:
    assert select_mode(command, disaggregation_mode, embedding_worker=False).name == name


@pytest.mark.parametrize(
    ("command", "disaggregation_mode"), [("prefill", "decode"), ("prefill", "null"), ("decode", "prefill")]
)
def test_a_mode_of_the_other_command_is_refused(command: Command, disaggregation_mode: DisaggregationMode) -> None:
    with pytest.raises(ValueError, match=f"--disaggregation-mode {disaggregation_mode} contradicts"):
        select_mode(command, disaggregation_mode, embedding_worker=False)


def test_every_role_has_one_row() -> None:
    assert sorted(mode.role for mode in MODES) == sorted(Role)
    assert len({mode.selected_by for mode in MODES}) == len(MODES)


def test_what_depends_on_the_mode() -> None:
    prefill, decode, aggregated = mode_of(Role.PREFILL), mode_of(Role.DECODE), mode_of(Role.AGGREGATED)
    assert (prefill.needs, decode.needs, aggregated.needs) == ((Role.DECODE,), (Role.PREFILL,), ())
    assert [mode.has_bootstrap for mode in (prefill, decode, aggregated)] == [True, False, False]
    assert (decode.probe, aggregated.probe) == (Probe.TOKEN_WITHOUT_PEER, Probe.TOKEN)
    assert prefill.selected_by == "kvbaton prefill"
    assert aggregated.selected_by == "kvbaton decode --disaggregation-mode null"


def test_an_embedding_worker_is_a_decode_command_with_a_flag() -> None:
    mode = select_mode("decode", None, embedding_worker=True)
    assert mode is mode_of(Role.EMBEDDING)
    assert (mode.rpc, mode.probe, mode.needs, mode.has_bootstrap) == (EMBED, Probe.EMBEDDING, (), False)
    assert mode.selected_by == "kvbaton decode --embedding-worker"
    assert select_mode("decode", "null", embedding_worker=True) is mode
    with pytest.raises(ValueError, match="contradicts --embedding-worker"):
        select_mode("decode", "decode", embedding_worker=True)
    with pytest.raises(ValueError, match="--embedding-worker is not for `kvbaton prefill`"):
        select_mode("prefill", None, embedding_worker=True)


def test_every_mode_takes_one_kind_of_request() -> None:
    assert {mode.role: mode.rpc for mode in MODES if mode.rpc != GENERATE} == {Role.EMBEDDING: EMBED}
