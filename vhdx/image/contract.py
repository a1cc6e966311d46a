# SPDX-License-Identifier: MIT
"""The interface between a disk and its image format, and the results of its operations."""

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
    """The result of a compaction; sizes in bytes.

    Attributes:
        file_size_before, file_size_after: size of the file.
        allocated_before, allocated_after: space that the host has allocated to the file.
        zeroed: number of blocks that held only zeros.
        moved: number of blocks that were moved towards the start of the file.
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
    """What a disk requires of an image format."""

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
        """The smallest size for a shrink, bytes; None if it is unknown what is in use."""

    @property
    def device(self) -> plane.Device:
        """The device that serves requests."""

    def describe(self) -> dict[str, Any]:
        """What ``vhdx info`` shows beyond the common part; sizes in bytes."""

    def resize(self, size: int, *, shrink: bool, unsafe: bool, move_gpt: bool) -> str | None:
        """Changes the size of the disk; returns what remains to be done in the guest, or None."""

    def snapshot(self, checkpoint: str | os.PathLike[str] | None) -> str:
        """Keeps the current content as a checkpoint and continues in a child; returns its path."""

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
        """Whether trimmed space waits for a flush before it goes back to the host."""

    def extents(self, offset: int, length: int) -> Iterator[plane.RawExtent]:
        """Runs of one state that cover the range, in order; neighbours may have equal states."""

    def close(self) -> None:
        """Makes everything durable and closes the files."""
