"""With whom a request shares cached prefixes, and the checks that refuse a bad one by field.

As in `requests`, the frontend and the workers run the same checks.
"""

from __future__ import annotations

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2
from services.requests import Limits

MAX_SALT_BYTES = 128


def check_cache_salt(request: generate_pb2.GenerateRequest, limits: Limits) -> str:
    """The salt, empty without one; an adapter is refused, which nobody serves. Raises RequestError naming the field."""
    if request.lora:
        raise invalid("lora", "no worker serves adapters")
    salt = request.cache_salt
    if len(salt.encode()) > MAX_SALT_BYTES:
        raise invalid("cache_salt", f"longer than {MAX_SALT_BYTES} bytes")
    if salt and not limits.cache_salts:
        raise invalid("cache_salt", "the workers' engine can't keep cached prefixes apart by it")
    return salt
