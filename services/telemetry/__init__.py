"""Logs and metrics.

- `logging`: structlog set-up of a process
- `metrics`: every metric that Baton itself exports, by name
"""
