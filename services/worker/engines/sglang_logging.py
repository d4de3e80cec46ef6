"""Where SGLang's own log lines go: to stderr, in this process and its children, and to no logger of ours.

Without `SGLANG_LOGGING_CONFIG_PATH` SGLang replaces the host's root handlers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

_VARIABLE = "SGLANG_LOGGING_CONFIG_PATH"

# Said on every healthy start, above the level it deserves.
_NOISE = (
    "Using custom SIGQUIT handler",
    "Ignore import error when loading sglang.srt.models.",
)


class WithoutNoise(logging.Filter):
    """Drops lines that would send a reader of the log the wrong way."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for the lines in `_NOISE`."""
        return not record.getMessage().startswith(_NOISE)


def logging_config(level: str) -> dict[str, Any]:
    """A `logging.config.dictConfig` for SGLang's loggers alone."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"sglang": {"format": "[%(asctime)s sglang %(process)d] %(levelname)s %(name)s: %(message)s"}},
        "filters": {"noise": {"()": f"{__name__}.{WithoutNoise.__qualname__}"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "formatter": "sglang",
                "filters": ["noise"],
            }
        },
        "loggers": {"sglang": {"level": level.upper(), "handlers": ["stderr"], "propagate": False}},
    }


def write_logging_config(level: str, tmp_dir: Path, target: MutableMapping[str, str]) -> None:
    """Point SGLang at `logging_config` through `target`, unless the operator has a configuration of their own."""
    if _VARIABLE in target:
        return
    path = tmp_dir / "logging.json"
    path.write_text(json.dumps(logging_config(level)), encoding="utf-8")
    target[_VARIABLE] = str(path)
