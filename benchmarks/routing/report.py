"""What the plays say: a table, what was promised, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from benchmarks.routing.play import Played
from benchmarks.svg import document
from services.tools.terminal import columns

MOST_IMBALANCE = 1.5
LEAST_HITS = 2.0


def table(plays: Sequence[Played]) -> str:
    """One line for each policy."""
    headings = ("POLICY", "HIT TOKENS", "HIT RATE", "TTFT MEAN", "P50", "P99", "REQUESTS MAX/MEAN", "TOKENS MAX/MEAN")
    return "\n".join(columns([headings, *(_row(played) for played in plays)]))


def promises(plays: Sequence[Played]) -> list[tuple[bool, str]]:
    """What must be seen to hold for kv-aware, as far as the others were played."""
    found = {played.name: played for played in plays}
    kv = found.get("kv-aware")
    if kv is None:
        return []
    said: list[tuple[bool, str]] = []
    if (turns := found.get("round-robin")) is not None:
        ratio = kv.hit_tokens / max(1, turns.hit_tokens)
        said.append((ratio >= LEAST_HITS, f"prefix-hit tokens {ratio:.2f} x round-robin (at least {LEAST_HITS:g})"))
    if (least := found.get("least-loaded")) is not None:
        ratio = kv.mean_ttft / least.mean_ttft
        said.append((ratio < 1, f"mean TTFT {ratio:.2f} x least-loaded (below 1)"))
    for busiest, what in ((kv.busiest_by_requests, "requests"), (kv.busiest_by_tokens, "computed tokens")):
        said.append((busiest <= MOST_IMBALANCE, f"most loaded worker {busiest:.2f} x mean in {what} (at most 1.5)"))
    errors = sum(sum(played.errors.values()) for played in plays)
    said.append((errors == 0, f"{errors} requests failed"))
    return said


def plot(plays: Sequence[Played]) -> str:
    """An SVG: four groups of bars, one bar for each policy."""
    panels: list[tuple[str, Callable[[Played], float], str]] = [
        ("prompt tokens found in a prefix cache, %", lambda played: 100 * played.hit_rate, "{:.0f}"),
        ("mean time to first token, ms", lambda played: 1000 * played.mean_ttft, "{:.0f}"),
        ("requests of the busiest worker / mean", lambda played: played.busiest_by_requests, "{:.2f}"),
        ("computed tokens of the busiest worker / mean", lambda played: played.busiest_by_tokens, "{:.2f}"),
    ]
    width, bar, left = 720, 22, 190
    parts: list[str] = []
    y = 20
    for title, value, form in panels:
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        y += 10
        longest = max(map(value, plays)) or 1.0
        for played in plays:
            length = (width - left - 80) * value(played) / longest
            color = "#2a6f97" if played.name.startswith("kv-aware") else "#a9b4c2"
            parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(played.name)}</text>')
            parts.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{bar - 5}" fill="{color}"/>')
            parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 15}">{form.format(value(played))}</text>')
            y += bar
        y += 30
    return document(width, y - 20, parts)


def _row(played: Played) -> tuple[str, ...]:
    return (
        played.name,
        f"{played.hit_tokens:,}",
        f"{played.hit_rate:.1%}",
        f"{1000 * played.mean_ttft:.0f} ms",
        f"{1000 * played.ttft(50):.0f} ms",
        f"{1000 * played.ttft(99):.0f} ms",
        f"{played.busiest_by_requests:.2f}",
        f"{played.busiest_by_tokens:.2f}",
    )
