"""The processes operators run: frontend, prefill and decode workers, and the `kvbaton` command."""
