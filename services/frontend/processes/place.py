"""Which of a frontend's processes is this, and where does it find the others?"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# sun_path has 108 bytes with the zero at its end.
MAX_SOCKET_PATH = 107


def lock_folder(folder: Path) -> int:
    """Holds what all processes share until the descriptor is closed: systemd-tmpfiles leaves alone what is locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


@dataclass(frozen=True, slots=True)
class Place:
    """One process of several; `number` is from 1 to `count`. `folder` belongs to the parent, and to this user alone."""

    number: int
    count: int
    folder: Path

    @property
    def socket(self) -> Path:
        """Where this process answers the others."""
        return self._socket(self.number)

    @property
    def others(self) -> Iterator[Path]:
        """Their sockets."""
        return (self._socket(number) for number in range(1, self.count + 1) if number != self.number)

    def _socket(self, number: int) -> Path:
        return self.folder / f"{number}.sock"
