# SPDX-License-Identifier: MIT
"""Raw images: the bytes of the file are the bytes of the disk.

A raw disk is a map too, of one page after the other on the file: so flushes are shared and a close
waits for what is under way, as with every other format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import UnsupportedError
from vhdx.image.plain import PlainImage
from vhdx.units import GIB

if TYPE_CHECKING:
    from vhdx.image.host import HostFile

__all__ = ["RawImage"]

_PAGE = 4 * GIB


class RawImage(PlainImage):
    """An open raw image; the file belongs to it.

    Args:
        host: the file.
        write: whether it may be changed.
        pool: for background work.
        size: bytes of the disk, where the file has more than that.
    """

    name = "raw"

    def __init__(
        self, host: HostFile, *, write: bool, pool: plane.Pool, size: int | None = None
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
        return {"type": "fixed", **super().describe()}
