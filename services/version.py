"""Baton's own version."""

from __future__ import annotations

import importlib.metadata


def own_version() -> str:
    """Of this distribution; "unknown" when it runs from a source tree that is not installed."""
    try:
        return importlib.metadata.version("kvbaton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
