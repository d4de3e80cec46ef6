"""`python -m benchmarks.routing`; see the package's docstring. Exit status 1 when a promise doesn't hold."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import structlog

import benchmarks.routing
from benchmarks.routing import cost
from benchmarks.routing.play import Played, play
from benchmarks.routing.report import plot, promises, table
from benchmarks.routing.trace import read_trace
from services.config.common import RoutingFlags

# Aggregated workers are chosen by the decode policy.
POLICIES = {
    "round-robin": RoutingFlags(decode_policy="round-robin"),
    "random": RoutingFlags(decode_policy="random"),
    "power-of-two": RoutingFlags(decode_policy="power-of-two"),
    "least-loaded": RoutingFlags(decode_policy="least-loaded"),
    "kv-aware": RoutingFlags(decode_policy="kv-aware"),
    "kv-aware-argmin": RoutingFlags(decode_policy="kv-aware", kv_aware_temperature=0.0),
    "kv-aware-guessing": RoutingFlags(decode_policy="kv-aware", kv_aware_events=False),
}


def main() -> int:
    """Plays, prints, draws."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description=benchmarks.routing.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policies", default=",".join(POLICIES), help="separated by commas")
    parser.add_argument("--plot", type=Path, default=Path("routing.svg"), help="where the SVG goes")
    parser.add_argument("--cost", action="store_true", help="only what one decision costs")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    trace = read_trace()
    if options.cost:
        print(cost.measure(trace))
        return 0
    plays = list[Played]()
    for name in options.policies.split(","):
        began = time.monotonic()
        plays.append(play(name, POLICIES[name], trace))
        print(f"played {name} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(plays))
    said = promises(plays)
    for holds, what in said:
        print(f"{'holds' if holds else 'BROKEN'}: {what}")
    options.plot.write_text(plot(plays))
    print(f"plot: {options.plot}")
    return 0 if all(holds for holds, _ in said) else 1


if __name__ == "__main__":
    sys.exit(main())
