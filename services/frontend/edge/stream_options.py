"""`stream_options` of chats and completions."""

from __future__ import annotations

from typing import Annotated

from kvbaton.errors import invalid
from services.frontend.edge.answer import UsageEvents
from services.frontend.edge.values import Body, Handling, Only


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: Annotated[bool | None, Handling.EMULATED] = None
    """End with an event that has the token counts."""
    continuous_usage_stats: Annotated[bool | None, Handling.EMULATED] = None
    """Extension: every event has the token counts of its choice so far. Only with `include_usage`."""
    include_obfuscation: Annotated[object, Only(False)] = None
    """Events are not padded."""


def usage_events(options: StreamOptions | None, *, stream: bool) -> UsageEvents:
    """Which events have token counts. Raises RequestError for options of no stream."""
    if options is None:
        return UsageEvents()
    if not stream:
        raise invalid("stream_options", "only with stream: true")
    at_end = bool(options.include_usage)
    return UsageEvents(at_end=at_end, always=at_end and bool(options.continuous_usage_stats))
