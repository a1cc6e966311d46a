# SPDX-License-Identifier: MIT
"""What an image format gives a disk, and what its operations answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from vhdx import plane
    from vhdx.interrupts import Progress

__all__ = ["Compacted", "Format"]


@dataclass
class Compacted:
    """What a compaction did; bytes.

    Attributes:
        file_size_before, file_size_after: of the file.
        allocated_before, allocated_after: what the host has set aside for it.
        zeroed: blocks that held nothing but zeros.
        moved: blocks that were moved down.
    """

    file_size_before: int
    file_size_after: int = 0
    allocated_before: int = 0
    allocated_after: int = 0
    zeroed: int = 0
    moved: int = 0

    @property
    def reclaimed(self) -> int:
        """Bytes that the host got back."""
        return max(0, self.allocated_before - self.allocated_after)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"reclaimed": self.reclaimed}


class Format(Protocol):
    """What an image format gives a disk."""

    name: str
    block_size: int
    logical_sector_size: int
    physical_sector_size: int
    read_only: bool
    path: str

    @property
    def key(self) -> tuple[int, int]:
        """(device, inode) of the file."""

    @property
    def minimum_size(self) -> int | None:
        """Bytes, or None where nothing says what is in use."""

    @property
    def device(self) -> plane.Device:
        """What requests go to."""

    def describe(self) -> dict[str, Any]:
        """What ``vhdx info`` shows beyond the common part; sizes in bytes."""

    def resize(self, size: int, *, shrink: bool, unsafe: bool, move_gpt: bool) -> str | None:
        """Changes the size of the disk; what is left to be done in the guest, or None."""

    def snapshot(self, checkpoint: str | os.PathLike[str] | None) -> str:
        """Keeps the disk as it is now under another name, and goes on in a child."""

    def compact(
        self,
        progress: Progress | None,
        cancel: Callable[[], bool] | None,
        pace: Callable[[int], None] | None,
    ) -> Compacted:
        """Gives space back to the host."""

    def chain(self) -> list[dict[str, Any]]:
        """The layers, this one first."""

    @property
    def has_released(self) -> bool:
        """Whether space that was trimmed waits for a flush to be given back."""

    def extents(self, offset: int, length: int) -> Iterator[plane.RawExtent]:
        """Runs of one state that cover the range, in order; neighbours may have equal states."""

    def close(self) -> None:
        """Makes everything durable and lets go of the files."""
