"""Every route of /openapi.json does what the document says, and has no 5xx, as schemathesis sees it."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from tests.support.fuzz_target import EMBEDDING_MODEL, MODEL, Target
from tests.support.tools import tool

# Of each kind for each route, beside the boundary values that schemathesis tries by itself.
EXAMPLES = 10
MAX_SECONDS = 20
GROWTH_BYTES = 96 * 2**20
HOOKS = "tests.integration.fuzz.schemathesis_hooks"
ROOT = Path(__file__).parents[3]

FLAGS = [
    "--phases=examples,coverage,fuzzing",
    f"--max-examples={EXAMPLES}",
    f"--max-time={MAX_SECONDS}",
    "--request-timeout=20",
    # A schema says what a body may look like, not which models are served or what a model can do.
    "--exclude-checks=positive_data_acceptance",
    "--suppress-health-check=all",
    "--generation-database=none",
    "--no-shrink",
    "--warnings=off",
    "--no-color",
    "--continue-on-failure",
]


async def test_answers_are_what_the_document_says(target: Target, seed: int, tmp_path: Path) -> None:
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": HOOKS,
        "PYTHONPATH": str(ROOT),
        "FUZZ_MODEL": MODEL,
        "FUZZ_EMBEDDING_MODEL": EMBEDDING_MODEL,
    }
    command = [tool("schemathesis"), "run", f"{target.http_url}/openapi.json", f"--seed={seed}", *FLAGS]
    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        answered = await target.answered_tokens()
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        print(done.stdout[-12_000:], done.stderr[-2_000:])
        assert done.returncode == 0, "schemathesis found something; its report is above"
        assert await target.answered_tokens() > answered, "none of its requests got as far as the engine"
