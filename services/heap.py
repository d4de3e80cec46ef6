"""Keeps the garbage collector's full collections short."""

from __future__ import annotations

import gc


def settle() -> None:
    """To be called once all is loaded: what lives now is never looked at again.

    A full collection stops every stream of the process, for tens of milliseconds where it goes through all that imports
    have left. Behind this call it goes through what requests have left.
    """
    gc.collect()
    gc.freeze()
