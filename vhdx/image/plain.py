# SPDX-License-Identifier: MIT
"""The base of raw and VHD images: it refuses resize, snapshot and compaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.errors import PoisonedError, UnsupportedError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from vhdx.image.contract import Compacted
    from vhdx.interrupts import Progress
    from vhdx.place import ImageFile

__all__ = ["PlainImage"]


class PlainImage:
    """An open image whose size and layers cannot be changed; it owns the file.

    Attributes:
        name: name of the format.
        host: the file.
        device: the device that serves requests.
    """

    name = ""
    block_size = 4096
    logical_sector_size = 512
    physical_sector_size = 4096
    device: plane.Map

    def __init__(self, host: ImageFile, *, write: bool) -> None:
        self.host = host
        self.path = host.path
        self.read_only = not write

    @property
    def key(self) -> tuple[int, int]:
        """(device, inode) of the file."""
        return self.host.key

    @property
    def minimum_size(self) -> int | None:
        """None, because the image cannot be resized."""
        return None

    def describe(self) -> dict[str, Any]:
        """File size, and the space that the host has allocated to it."""
        return {"file_size": self.host.leaf.size, "allocated_size": self.host.allocated()}

    def resize(self, size: int, *, shrink: bool, unsafe: bool, move_gpt: bool) -> str | None:
        """Refused."""
        raise UnsupportedError(
            f"the size of a {self.name} image cannot be changed here",
            path=self.path,
            hint="convert it to VHDX"
            if self.name == "vhd"
            else "use truncate on the file, or convert it to VHDX",
        )

    def snapshot(self, checkpoint: str | os.PathLike[str] | None) -> str:
        """Refused."""
        raise UnsupportedError(
            f"a {self.name} image has no snapshots here", path=self.path, hint="convert it to VHDX"
        )

    def compact(
        self,
        progress: Progress | None,
        cancel: Callable[[], bool] | None,
        pace: Callable[[int], None] | None,
    ) -> Compacted:
        """Refused."""
        raise UnsupportedError(
            f"a {self.name} image is not compacted in place",
            path=self.path,
            hint="convert it: only what is not zero is copied",
        )

    @property
    def has_released(self) -> bool:
        """False: space goes back to the host at once."""
        return False

    def chain(self) -> list[dict[str, Any]]:
        """One layer."""
        return [{"path": self.path, "virtual_size": self.device.size, **self.describe()}]

    def extents(self, offset: int, length: int) -> Iterator[plane.RawExtent]:
        """Runs of one state that cover the range, in order."""
        return self.device.extents(offset, length)

    def close(self) -> None:
        """Flushes and closes."""
        if self.device.state == plane.FORKED:
            self.host.close()
            return
        poisoned = True
        try:
            if not self.read_only and self.device.state == 0:
                self.device.flush()
            poisoned = self.device.state != 0
        finally:
            try:
                self.device.close()
                if poisoned and not self.read_only:
                    raise PoisonedError(
                        "an earlier flush failed, so data written since the last successful one "
                        "may be lost",
                        path=self.path,
                    )
                if not self.read_only:
                    self.finish()
            finally:
                self.host.close()

    def finish(self) -> None:
        """Hook for final work on the file after the device is closed."""
