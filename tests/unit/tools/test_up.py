"""`kvbaton up`: its command line, and what it tells the operator to type."""

import json
import shlex

import pytest

from services.cli import main
from services.tools.up import _commands


def test_flags_for_the_workers_stand_behind_two_dashes(capsys: pytest.CaptureFixture[str]):
    assert main(["up", "--grpc-prot", "1"]) == 2
    assert "--grpc-prot" in capsys.readouterr().err


def test_each_way_in_has_a_line_that_can_be_pasted():
    generate, grpcurl, curl = (shlex.split(text) for text in _commands("127.0.0.1:4000", "http://127.0.0.1:80", "m'1"))
    assert generate[:3] == ["kvbaton", "generate", "The capital of France is"]
    assert generate[-2:] == ["--endpoint", "127.0.0.1:4000"]
    assert json.loads(grpcurl[grpcurl.index("-d") + 1])["sampling"]["max_new_tokens"] == 16
    assert grpcurl[-2:] == ["127.0.0.1:4000", "kvbaton.v1.GenerateService/Generate"]
    assert json.loads(curl[-1])["model"] == "m'1"


def test_the_usual_endpoint_needs_no_flag():
    assert "--endpoint" not in _commands("127.0.0.1:50051", "http://127.0.0.1:8000", "m")[0]
