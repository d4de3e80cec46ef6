"""The worker that the request names."""

from __future__ import annotations

from typing import ClassVar

from services.frontend.router.policies.least_loaded import LeastLoaded


class Direct(LeastLoaded):
    """Every request must name its worker, so all candidates are ranks of that one: the least loaded of them.

    A request that names a worker gets it under every policy; under this one a request that doesn't is refused,
    but for the frontend's own probe, which goes to the least loaded of all.
    """

    needs_hint: ClassVar[bool] = True
