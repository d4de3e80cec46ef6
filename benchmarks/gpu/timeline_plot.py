"""The timeline as an SVG: where the time to first token goes beside computing the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from benchmarks.gpu.moments import STAGES
from benchmarks.svg import document

_COLORS = {
    "to the engine": "#a9b4c2",
    "to its scheduler": "#6d7f91",
    "bootstrap": "#e9c46a",
    "rest of the transfer": "#e76f51",
    "decode notices": "#2a9d8f",
    "to the client": "#2a6f97",
}
_WIDTH, _LEFT, _RIGHT, _BAR = 860, 190, 210, 24


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """Bars of `rows` with `system`, `input_tokens`, `stages` and `ttft_ms`; prefill's computing is left out of them."""
    overheads = [sum(max(0.0, each["stages"].get(name, 0.0)) for name in _COLORS) for each in rows]
    scale = (_WIDTH - _LEFT - _RIGHT) / (max(overheads, default=0.0) or 1.0)
    parts = ['<text x="10" y="22" font-weight="bold">time to first token without prefill\'s computing, ms</text>']
    x = 10
    for name, color in _COLORS.items():
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17}" y="45">{escape(name)}</text>')
        x += 34 + round(6.6 * len(name))
    y = 66
    for row, overhead in zip(rows, overheads, strict=True):
        parts += _bar(row, overhead, scale, y)
        y += _BAR
    return document(_WIDTH, y + 10, parts)


def _bar(row: dict[str, Any], overhead: float, scale: float, y: int) -> list[str]:
    label = f"{row['system']}, {row['input_tokens']} tokens"
    parts = [f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>']
    x = float(_LEFT)
    for name, _, _ in STAGES:
        width = max(0.0, row["stages"].get(name, 0.0)) * scale
        if name in _COLORS and width:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR - 6}" fill="{_COLORS[name]}"/>')
            x += width
    told = f"{overhead:.1f} of {row['ttft_ms']:.1f} ms"
    return [*parts, f'<text x="{x + 6:.1f}" y="{y + 14}">{told}</text>']
