# SPDX-License-Identifier: MIT
"""Reads a file as if its log had been replayed, without changing the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import ReadOnlyError
from vhdx.format.log import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vhdx.format.log import Patch

__all__ = ["Overlay", "ReplayedFile"]


class Overlay:
    """Reads a leaf through the patches of a log that was not replayed into it.

    Does not own the leaf. Bytes past the leaf's end read as zeros, because replay would extend the
    file with zeros.
    """

    def __init__(self, leaf: plane.Device, patches: list[Patch], size: int) -> None:
        self._leaf = leaf
        self._patches = patches
        self._size = size
        if patches:  # numpy is loaded only if there is a log to replay
            self._starts = np.array([patch.offset for patch in patches], np.int64)
            self._ends = np.array([patch.offset + patch.length for patch in patches], np.int64)

    @property
    def size(self) -> int:
        """Size of the file after replay, bytes."""
        return max(self._size, self._leaf.size)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return not self._patches

    def touches(self, start: int, end: int) -> bool:
        """Whether a patch changes a byte of this range."""
        return len(self._touching(start, end)) > 0

    def _touching(self, start: int, end: int) -> list[int]:
        """Numbers of the patches that change a byte of this range, in their order."""
        if not self._patches:
            return []
        return np.flatnonzero((self._starts < end) & (self._ends > start)).tolist()

    def covers_only(self, spans: Iterable[tuple[int, int]]) -> bool:
        """Whether replay keeps the file size, and each patch is inside one of the spans."""
        if not self._patches:
            return self.size == self._leaf.size
        inside = np.zeros(len(self._patches), np.bool_)
        for start, end in spans:
            inside |= (self._starts >= start) & (self._ends <= end)
        return self.size == self._leaf.size and bool(inside.all())

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of metadata from ``offset`` on."""
        present = max(0, min(length, self._leaf.size - offset))
        data = bytearray(length)
        if present:
            self._leaf.read_into(memoryview(data)[:present], offset)
        for i in self._touching(offset, offset + length):
            patch = self._patches[i]
            start = max(patch.offset, offset)
            end = min(patch.offset + patch.length, offset + length)
            piece = (
                bytes(end - start)
                if patch.data is None
                else patch.data[start - patch.offset : end - patch.offset]
            )
            data[start - offset : end - offset] = piece
        return bytes(data)


class ReplayedFile:
    """A read-only device that shows the file with its log replayed in memory.

    Python reads the pages that the log changes, or that replay would add, through the overlay. C
    reads all other pages directly from the file.
    """

    def __init__(self, leaf: plane.Device, overlay: Overlay, pool: plane.Pool, path: str) -> None:
        self._leaf, self._overlay = leaf, overlay
        size = overlay.size
        self._changed = plane.Callback(self, size, read_only=True)
        self.device = plane.Map(
            self, size, size, SECTOR, [leaf, self._changed], read_only=True, pool=pool, path=path
        )

    def load(self, first: int, count: int) -> None:
        """Chooses the device that each page is read from."""
        start = first // plane.CHUNK_PAGES * plane.CHUNK_PAGES
        stop = min(-(-(first + count) // plane.CHUNK_PAGES) * plane.CHUNK_PAGES, self._pages)
        pages = np.arange(start, stop, dtype=np.uint64)
        whole = self._leaf.size // SECTOR
        lowers = (pages >= np.uint64(whole)).astype(np.uint64)
        if self._overlay.touches(start * SECTOR, stop * SECTOR):
            for page in range(start, stop):
                if self._overlay.touches(page * SECTOR, (page + 1) * SECTOR):
                    lowers[page - start] = 1
        offsets = pages * np.uint64(SECTOR)
        self.device.install(start, plane.entries(plane.Kind.DATA, lowers, offsets, 0))

    @property
    def _pages(self) -> int:
        return -(-self._overlay.size // SECTOR)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._overlay.read(offset, len(buffer))

    def extents(self, offset: int, length: int) -> Iterable[plane.device.RawExtent]:
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]

    def _refuse(self, *_: object, **__: object) -> None:
        raise ReadOnlyError("its log was not replayed into the file, so it cannot be changed")

    pwrite = zero = trim = resize = grant = change_range = commit = _refuse
    flush = open_gate = _refuse
