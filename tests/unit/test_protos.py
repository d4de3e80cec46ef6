"""The committed stubs are what the protos generate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run(
        [ROOT / "scripts" / "gen_protos.sh", tmp_path],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    generated = sorted((tmp_path / "kvbaton" / "v1").iterdir())
    committed = sorted(path for path in (ROOT / "kvbaton" / "v1").glob("*_pb2*"))
    assert [path.name for path in generated] == [path.name for path in committed]
    stale = [new.name for new, old in zip(generated, committed, strict=True) if new.read_bytes() != old.read_bytes()]
    assert stale == [], "run `make protos`"


def test_stubs_import_beside_the_oldest_runtime_that_is_promised() -> None:
    """grpcio refuses stubs that a newer grpcio-tools generated; the GPU image has 1.84.0."""
    for path in (ROOT / "kvbaton" / "v1").glob("*_pb2_grpc.py"):
        assert "GRPC_GENERATED_VERSION = '1.84.0'" in path.read_text()
