# SPDX-License-Identifier: MIT
"""Raw images: the bytes of the file are the bytes of the disk.

A raw disk is a map, too; each page lies at its own offset in the file. So, as with every other
format, concurrent flushes are shared and a close waits for requests in flight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import UnsupportedError
from vhdx.image.plain import PlainImage
from vhdx.units import GIB

if TYPE_CHECKING:
    from vhdx.place import ImageFile

__all__ = ["RawImage"]

_PAGE = 4 * GIB


class RawImage(PlainImage):
    """An open raw image, which owns the file.

    Args:
        host: the file.
        write: allow changes.
        pool: for background work.
        size: bytes of the disk; the file's size when None.
    """

    name = "raw"

    def __init__(
        self, host: ImageFile, *, write: bool, pool: plane.Pool, size: int | None = None
    ) -> None:
        super().__init__(host, write=write)
        size = host.leaf.size if size is None else size
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
        """Maps each page to the same offset in the file."""
        offsets = np.arange(first, first + count, dtype=np.uint64) * np.uint64(_PAGE)
        self.device.install(first, plane.entries(plane.Kind.DATA, 0, offsets, 0))

    def grant(self, wanted: int) -> None:
        """Never called: no page is a hole."""
        raise UnsupportedError("a raw image has no holes to fill", path=self.path)

    def open_gate(self) -> None:
        """Opens the gate at once: there is nothing to prepare."""
        self.device.set_gate(is_open=True)

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        """Never called: the file zeroes and trims ranges itself."""
        raise UnsupportedError(f"a raw image does not {operation.name} by pages", path=self.path)

    def commit(self, changes: plane.Changes) -> None:
        """Nothing is ever published."""
        raise UnsupportedError("a raw image has no metadata", path=self.path)

    def describe(self) -> dict[str, Any]:
        """Type and file size."""
        return {"type": "fixed", **super().describe()}
