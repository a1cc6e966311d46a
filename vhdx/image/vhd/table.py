# SPDX-License-Identifier: MIT
"""The block table of a dynamic or differencing VHD, and the space between its blocks.

A table entry is the sector at which the sector bitmap of a block begins. The data of the block follow
the bitmap.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import DamagedError, Reason
from vhdx.format import vhd
from vhdx.units import MIB, round_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from vhdx.place import ImageFile

__all__ = ["ALIGNMENT", "BlockTable", "Survey"]

ALIGNMENT = 4096
"""Fresh data begin at multiples of this, whatever the length of the bitmap."""

_ENTRIES = vhd.SECTOR // 4  # of the table in a sector


class Survey(NamedTuple):
    """What a file has room for.

    Attributes:
        end: where fresh blocks may begin, behind everything.
        free: offsets of data of blocks that fit into zeros between the stored ones.
        kept_end: the end of data whose owner is not known; the file is never cut before it.
    """

    end: int
    free: list[int]
    kept_end: int


class BlockTable:
    """The table in memory; the lock of its image guards ``entries``.

    Args:
        host: the file.
        footer, header: of the file.

    Attributes:
        blocks: how many the disk has.
        bitmap: bytes of the sector bitmap before the data of each block.
        entries: sectors, by block, in whole sectors of the table; :data:`vhd.UNUSED` for none.

    Raises:
        DamagedError: the table lies outside the file.
    """

    def __init__(self, host: ImageFile, footer: vhd.Footer, header: vhd.DynamicHeader) -> None:
        self._path, self._leaf = host.path, host.leaf
        self._footer, self._header = footer, header
        self.block_size, self.size = header.block_size, footer.virtual_size
        self.blocks = -(-self.size // self.block_size)
        self.bitmap = vhd.bitmap_length(self.block_size)
        self.entries = self._read()

    def used(self) -> npt.NDArray[np.int64]:
        """The blocks that have an entry."""
        return np.flatnonzero(self.entries[: self.blocks] != vhd.UNUSED)

    def data_offsets(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Where the data of stored blocks begin, bytes."""
        sectors = self.entries[blocks].astype(np.uint64)
        found: npt.NDArray[np.uint64] = sectors * np.uint64(vhd.SECTOR) + np.uint64(self.bitmap)
        return found

    def end(self) -> int:
        """The end of all that is stored, metadata included, bytes."""
        table = self._header.table_offset + 4 * self._header.entries
        header = self._footer.data_offset + vhd.HEADER_SIZE
        data = self.data_offsets(self.used())
        return max(table, header, int(data.max()) + self.block_size if len(data) else 0)

    def sector_steps(self, sectors: Iterable[int]) -> list[plane.Step]:
        """Writes of these sectors of the table, as they are now."""
        steps = []
        for sector in sectors:
            part = self.entries[sector * _ENTRIES : (sector + 1) * _ENTRIES].astype(">u4").tobytes()
            at = self._header.table_offset + sector * vhd.SECTOR
            steps.append(plane.Step(plane.Operation.WRITE, at, buffer=part))
        return steps

    def sectors_of(self, blocks: npt.NDArray[np.uint64]) -> set[int]:
        """The sectors of the table that have the entries of these blocks."""
        return set(np.unique(blocks // np.uint64(_ENTRIES)).tolist())

    def damaged(self, message: str, block: int, reason: Reason) -> DamagedError:
        """An error at the entry of ``block``."""
        return DamagedError(
            message, reason=reason, path=self._path, offset=self._header.table_offset + 4 * block
        )

    def _read(self) -> npt.NDArray[np.uint32]:
        at, length = self._header.table_offset, 4 * self.blocks
        if at < vhd.FOOTER_SIZE or at + length > self._leaf.size:
            raise self.damaged("the block table lies outside the file", 0, Reason.BAT_SIZE)
        padded = min(round_up(length, vhd.SECTOR), self._leaf.size - at)
        data = self._leaf.read(padded, at)
        return np.frombuffer(data.ljust(round_up(length, 512), b"\xff"), ">u4").astype(np.uint32)

    def ends(self, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """End offset of each stored block; the last block may be cut at the end of the disk."""
        starts = self.entries[blocks].astype(np.int64) * vhd.SECTOR
        lengths = np.minimum(self.block_size, self.size - blocks * self.block_size)
        ends: npt.NDArray[np.int64] = starts + self.bitmap + lengths
        return ends

    def stored(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Blocks of a range that are stored, and those whose table entry is outside the file."""
        table = self.entries[first : first + count]
        blocks = first + np.flatnonzero(table != vhd.UNUSED)
        bad = (self.ends(blocks) > self._leaf.size) | (self.entries[blocks] == 0)
        return blocks[~bad], blocks[bad]

    def refuse(self, bad: npt.NDArray[np.int64]) -> None:
        """Raises DamagedError for the first of these blocks, whose entries are outside the file."""
        for block in bad[:1].tolist():
            raise self.damaged(
                f"block {block} is at {int(self.entries[block]) * 512:#x}, outside the file",
                block,
                Reason.BAT_OFFSET,
            )

    def survey(self) -> Survey:
        """Checks what must hold before a write, and finds the space between the stored blocks.

        Raises:
            DamagedError: blocks overlap each other or metadata, or lie outside the file.
        """
        free: list[int] = []
        kept_end = 0
        blocks, bad = self.stored(0, self.blocks)
        self.refuse(bad)
        starts = self.entries[blocks].astype(np.int64) * vhd.SECTOR
        order = np.argsort(starts, kind="stable")
        blocks, starts = blocks[order], starts[order]
        ends = starts + self.bitmap + self.block_size
        at = self._header.table_offset
        table = at, at + round_up(4 * self._header.entries, vhd.SECTOR)
        header = self._footer.data_offset, self._footer.data_offset + vhd.HEADER_SIZE
        metadata = sorted([(0, vhd.FOOTER_SIZE), header, table])
        if at % vhd.SECTOR or any(a[1] > b[0] for a, b in itertools.pairwise(metadata)):
            raise self.damaged("the block table is misplaced", 0, Reason.BAT_OFFSET)
        for low, high in metadata:
            for block in blocks[(starts < high) & (ends > low)][:1].tolist():
                raise self.damaged(f"block {block} overlaps metadata", block, Reason.BAT_OVERLAP)
        for which in np.flatnonzero(starts[1:] < ends[:-1])[:1].tolist():
            block = int(blocks[which + 1])
            raise self.damaged(f"block {block} overlaps another", block, Reason.BAT_OVERLAP)
        taken = sorted([*metadata, *zip(starts.tolist(), ends.tolist(), strict=True)])
        end = round_up(taken[-1][1], vhd.SECTOR)
        footer_at = self._leaf.size - vhd.FOOTER_SIZE
        if vhd.parse_footer(self._leaf.read(vhd.FOOTER_SIZE, footer_at)) is None:
            footer_at = self._leaf.size  # no footer: it may be another program's data
        for (_, low), (high, _) in itertools.pairwise([*taken, (max(end, footer_at), 0)]):
            if not self._is_zero(low, high):
                # Data of another program, such as XenServer's batmap, or remains of a crash. It is
                # unknown which of them matter, so all of them stay.
                kept_end = max(kept_end, high)
                continue
            if high > end:
                break  # fresh blocks begin there
            data = round_up(low + self.bitmap, ALIGNMENT)
            while data + self.block_size <= high:
                free.append(data)
                data = round_up(data + self.block_size + self.bitmap, ALIGNMENT)
        return Survey(max(end, round_up(kept_end, vhd.SECTOR)), free, kept_end)

    def _is_zero(self, start: int, end: int) -> bool:
        """Whether the range of the file holds only zeros."""
        for extent in self._leaf.extents(start, max(0, end - start)):
            if extent.state != plane.DATA:
                continue
            stop = min(extent.offset + extent.length, end)
            for at in range(max(extent.offset, start), stop, MIB):
                if any(self._leaf.read(min(MIB, stop - at), at)):
                    return False
        return True
