"""Baton's client: generated stubs in `kvbaton.v1`, a small async client in `kvbaton.client`, typed errors."""
