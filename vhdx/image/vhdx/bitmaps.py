# SPDX-License-Identifier: MIT
"""Sector bitmap blocks of a differencing image ([MS-VHDX] 2.4).

A chunk of payload blocks shares one bitmap block of 1 MiB; each block has a slice of it. C keeps the
slices of partially present blocks and sets their bits. This module finds a slice when its block is
loaded, and turns slices into 4 KiB pages of the log at a commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.errors import DamagedError, Reason
from vhdx.format import bat
from vhdx.format.log import SECTOR
from vhdx.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from vhdx import plane
    from vhdx.image.vhdx.structure import Structure

    Read = Callable[[npt.NDArray[np.uint64]], npt.NDArray[np.uint8]]
    Pages = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]

__all__ = ["SectorBitmaps"]

_PAGES_AT_ONCE = 1024


class SectorBitmaps:
    """Locates the sector bitmaps of one open image; the caller serialises the calls.

    Args:
        structure: of the image.
        leaf: the file.
        path: the name in errors.
    """

    def __init__(self, structure: Structure, leaf: plane.Device, path: str) -> None:
        self._structure = structure
        self._geometry = structure.geometry
        self._leaf = leaf
        self._path = path
        self._placed: dict[int, int] = {}  # chunk -> offset of a bitmap block placed since the open

    def adopt(self, structure: Structure) -> None:
        """Switches to a new structure."""
        self._structure, self._geometry = structure, structure.geometry
        gone = [chunk for chunk in self._placed if chunk >= self._geometry.bitmaps]
        for chunk in gone:
            del self._placed[chunk]

    @property
    def slice_length(self) -> int:
        """Bytes of the bitmap of one payload block."""
        return MIB // self._geometry.chunk_ratio

    def position(self, chunk: int) -> int:
        """Where the BAT entry of a chunk's bitmap block stands in the file, bytes."""
        index = self._geometry.bitmap_index(chunk)
        return self._structure.bat.offset + index * bat.ENTRY_SIZE

    def find(self, chunk: int) -> int | None:
        """Where the bitmap block of ``chunk`` stands, bytes; None where there is none.

        Raises:
            DamagedError: it is outside the file.
        """
        if chunk in self._placed:
            return self._placed[chunk]
        overlay, at = self._structure.overlay, self.position(chunk)
        entry = np.frombuffer(overlay.read(at, bat.ENTRY_SIZE), "<u8").astype(np.uint64)
        offset = int(bat.offset_of(entry)[0])
        if int(bat.state_of(entry)[0]) < bat.BitmapState.PRESENT:
            return None
        if offset < MIB or offset + MIB > max(overlay.size, self._leaf.size):
            raise DamagedError(
                f"the sector bitmap block of chunk {chunk} has the invalid offset {offset:#x}",
                reason=Reason.SECTOR_BITMAP,
                path=self._path,
                offset=at,
            )
        return offset

    def load(self, block: int) -> bytes:
        """The slice of a partially present block.

        Raises:
            DamagedError: it is not there.
        """
        chunk, within = divmod(block, self._geometry.chunk_ratio)
        offset = self.find(chunk)
        if offset is None:
            raise DamagedError(
                f"block {block} is partially present, but its sector bitmap is not there",
                reason=Reason.SECTOR_BITMAP,
                path=self._path,
                offset=self.position(chunk),
            )
        return self._structure.overlay.read(offset + within * self.slice_length, self.slice_length)

    def missing(self, blocks: npt.NDArray[np.uint64]) -> list[int]:
        """Chunks of these blocks that have no bitmap block yet."""
        chunks = np.unique(blocks // np.uint64(self._geometry.chunk_ratio)).tolist()
        return [chunk for chunk in chunks if self.find(chunk) is None]

    def place(self, chunks: list[int], offsets: list[int]) -> None:
        """Notes the offsets of new bitmap blocks, which are zeroed and durable in the BAT."""
        self._placed.update(zip(chunks, offsets, strict=True))

    def pages(
        self, blocks: npt.NDArray[np.uint64], bitmaps: npt.NDArray[np.uint8], read: Read
    ) -> Iterator[Pages]:
        """Yields the 4 KiB pages of the file that these slices change, in batches.

        Args:
            blocks: partially present blocks whose bitmap blocks have places.
            bitmaps: their slices, n by slice_length.
            read: reads the current pages at ascending offsets.
        """
        length = self.slice_length
        chunks, within = np.divmod(blocks, np.uint64(self._geometry.chunk_ratio))
        bases = {int(chunk): self.find(int(chunk)) for chunk in np.unique(chunks)}
        starts = np.array([bases[int(chunk)] for chunk in chunks], np.uint64)
        starts += within * np.uint64(length)
        step = max(1, _PAGES_AT_ONCE * SECTOR // max(length, SECTOR))
        for first in range(0, len(blocks), step):
            some = slice(first, first + step)
            yield self._changed(read, starts[some], bitmaps[some])

    def _changed(
        self, read: Read, starts: npt.NDArray[np.uint64], bitmaps: npt.NDArray[np.uint8]
    ) -> Pages:
        piece = min(self.slice_length, SECTOR)
        pieces = bitmaps.reshape(-1, piece)
        steps = np.arange(0, self.slice_length, piece, dtype=np.uint64)
        at = (starts[:, None] + steps).ravel()
        offsets, inverse = np.unique(at // np.uint64(SECTOR), return_inverse=True)
        offsets *= np.uint64(SECTOR)
        before = read(offsets)
        after = before.copy()
        slots = (at % np.uint64(SECTOR) // np.uint64(piece)).astype(np.int64)
        after.reshape(len(offsets), SECTOR // piece, piece)[inverse, slots] = pieces
        changed = (before != after).any(axis=1)
        return offsets[changed], after[changed]
