"""`--sim`: what it takes, and how it refuses."""

from __future__ import annotations

import pytest

from services.worker.engines.simulated.options import SimulatedOptions, parse_options


def test_every_kind_of_value() -> None:
    options = parse_options("dp_size=2, decode_step=0.01,prefix_cache=off,script=a.json", page_size=32)
    assert options == SimulatedOptions(dp_size=2, decode_step=0.01, prefix_cache=False, script="a.json", page_size=32)
    assert parse_options("") == SimulatedOptions()
    assert parse_options("page_size=8", page_size=32).page_size == 8


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("speed=3", "there is no 'speed'"),
        ("dp_size", "'dp_size' is not key=value"),
        ("dp_size=two", "dp_size='two'"),
        ("prefix_cache=maybe", "prefix_cache='maybe'"),
        ("dp_size=0", "dp_size must be at least 1"),
        ("eos_rate=1.5", "eos_rate"),
        ("decode_step=-1", "decode_step"),
        ("decode_step=nan", "decode_step"),
        ("tick=0", "tick"),
        ("max_total_tokens=3", "max_total_tokens"),
        ("data_port=70000", "data_port"),
        ("vocab_size=2", "vocab_size"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"--sim: .*{named}"):
        parse_options(text)


def test_grammars_are_taken_with_a_script_or_when_asked_for() -> None:
    assert SimulatedOptions().grammar_backend == ""
    assert parse_options("script=a.json").grammar_backend == "simulated"
    assert parse_options("grammars=true").grammar_backend == "simulated"
