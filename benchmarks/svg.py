"""A small SVG document."""

from __future__ import annotations

from collections.abc import Sequence


def document(width: int, height: int, parts: Sequence[str]) -> str:
    """The elements on a white ground, sizes in pixels."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'{head} font-size="13">', background, *parts, "</svg>", ""])
