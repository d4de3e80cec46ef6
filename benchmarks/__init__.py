"""Benchmarks: ratios measured side by side in one run; none gates on wall time."""
