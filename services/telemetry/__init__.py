"""Logs, metrics and traces.

- `logging`: structlog set-up of a process
- `metrics`: every metric that Baton itself exports, by name; `gaps`: the one that every token is counted in
- `shared`: one page for several processes of a frontend
- `exposition`: the page of /metrics, from several sources
- `tracing`: spans, and how their context travels; `otlp`: where they go
"""
