# SPDX-License-Identifier: MIT
"""Raw images: the bytes of the file are the bytes of the disk.

A raw disk is a map too, of one page after the other on the file: so flushes are shared and a close
waits for what is under way, as with every other format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vhdx import plane
from vhdx.errors import UnsupportedError
from vhdx.units import GIB, KIB

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from vhdx.image.compacting import Compacted
    from vhdx.image.host import HostFile
    from vhdx.image.layout import Progress

__all__ = ["RawImage"]

_PAGE = 4 * GIB


class RawImage:
    """An open raw image; the file belongs to it."""

    name = "raw"
    block_size = 4 * KIB
    logical_sector_size = 512
    physical_sector_size = 4096

    def __init__(self, host: HostFile, *, write: bool, pool: plane.Pool) -> None:
        self._host = host
        self.path = host.path
        self.read_only = not write
        size = host.leaf.size
        self.device = plane.Map(
            self,
            size,
            max(size, 1),
            _PAGE,
            [host.leaf],
            transparent=True,
            read_only=not write,
            pool=pool,
            path=host.path,
        )

    def load(self, first: int, count: int) -> None:
        """Every page lies where it belongs."""
        offsets = np.arange(first, first + count, dtype=np.uint64) * np.uint64(_PAGE)
        self.device.install(first, plane.entries(plane.Kind.DATA, 0, offsets, 0))

    def grant(self, wanted: int) -> None:
        """Never asked for: no page is a hole."""
        raise UnsupportedError("a raw image has no holes to fill", path=self.path)

    def open_gate(self) -> None:
        """Nothing to prepare."""
        self.device.set_gate(is_open=True)

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        """Never asked for: the file does it."""
        raise UnsupportedError(f"a raw image does not {operation.name} by pages", path=self.path)

    def commit(self, changes: plane.Changes) -> None:
        """Nothing is ever published."""
        raise UnsupportedError("a raw image has no metadata", path=self.path)

    def describe(self) -> dict[str, Any]:
        """Type and file size."""
        return {
            "type": "fixed",
            "file_size": self._host.leaf.size,
            "allocated_size": self._host.allocated(),
        }

    @property
    def key(self) -> tuple[int, int]:
        """Of the file."""
        return self._host.key

    @property
    def minimum_size(self) -> int | None:
        """Not told: a raw image is not resized here."""
        return None

    def resize(self, size: int, *, shrink: bool, unsafe: bool) -> None:
        """Refused: truncate(1) does it, when nobody uses the image."""
        raise UnsupportedError(
            "the size of a raw image is its file's", path=self.path, hint="use truncate on the file"
        )

    def snapshot(self, checkpoint: str | os.PathLike[str] | None) -> str:
        """Refused: a raw image names no parent."""
        raise UnsupportedError(
            "a raw image has no snapshots", path=self.path, hint="convert it to VHDX first"
        )

    def compact(self, progress: Progress | None, cancel: Callable[[], bool] | None) -> Compacted:
        """Refused: there is nothing to move in a raw image."""
        raise UnsupportedError(
            "a raw image has no blocks", path=self.path, hint="use fallocate --dig-holes on the file"
        )

    def chain(self) -> list[dict[str, Any]]:
        """One layer."""
        return [{"path": self.path, "virtual_size": self.device.size, **self.describe()}]

    def close(self) -> None:
        """Flushes and closes."""
        if self.device.state == plane.FORKED:
            self._host.close()
            return
        try:
            if not self.read_only and self.device.state == 0:
                self.device.flush()
        finally:
            self.device.close()
            self._host.close()
