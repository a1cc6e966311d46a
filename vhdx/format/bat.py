# SPDX-License-Identifier: MIT
"""Block allocation table: geometry and entries ([MS-VHDX] 2.5).

Entries are handled as numpy arrays, never one by one: a table has up to 67 million.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.units import MIB, round_up

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "ENTRY_SIZE",
    "BitmapState",
    "BlockState",
    "Geometry",
    "offset_of",
    "pack_entries",
    "reserved_of",
    "state_of",
]

ENTRY_SIZE = 8
_STATE = 7
_RESERVED = 0xFFFF8
_MIB_SHIFT = 20


class BlockState(IntEnum):
    """States of payload blocks (2.5.1.1)."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


class BitmapState(IntEnum):
    """States of sector bitmap blocks (2.5.1.2)."""

    NOT_PRESENT = 0
    PRESENT = 6


@dataclass(frozen=True)
class Geometry:
    """Positions of the blocks' entries in the table (2.5); sizes in bytes."""

    virtual_size: int
    block_size: int
    logical_sector_size: int
    has_parent: bool

    @property
    def chunk_ratio(self) -> int:
        """Number of payload blocks that one sector bitmap block describes."""
        return (1 << 23) * self.logical_sector_size // self.block_size

    @property
    def blocks(self) -> int:
        """Number of payload blocks."""
        return -(-self.virtual_size // self.block_size)

    @property
    def bitmaps(self) -> int:
        """Number of sector bitmap blocks."""
        return -(-self.blocks // self.chunk_ratio)

    @property
    def entries(self) -> int:
        """Number of table entries, including those of sector bitmap blocks."""
        if self.has_parent:
            return self.bitmaps * (self.chunk_ratio + 1)
        return self.blocks + (self.blocks - 1) // self.chunk_ratio

    @property
    def table_length(self) -> int:
        """Size of the region that the table needs: bytes, a multiple of 1 MiB."""
        return round_up(self.entries * ENTRY_SIZE, MIB)

    def index(self, block: int) -> int:
        """Index of a payload block's entry."""
        return block + block // self.chunk_ratio

    def indices(self, blocks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Indices of the payload blocks' entries."""
        result: npt.NDArray[np.uint64] = blocks + blocks // np.uint64(self.chunk_ratio)
        return result

    def bitmap_index(self, chunk: int) -> int:
        """Index of the entry of a chunk's sector bitmap block."""
        return (chunk + 1) * self.chunk_ratio + chunk


def state_of(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """States, bits 0 to 2."""
    result: npt.NDArray[np.uint64] = entries & np.uint64(_STATE)
    return result


def reserved_of(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Reserved bits 3 to 19; not zero in a bad entry."""
    result: npt.NDArray[np.uint64] = entries & np.uint64(_RESERVED)
    return result


def offset_of(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Offsets in the file, in bytes (FileOffsetMB is in bits 20 to 63, so they need no shift)."""
    result: npt.NDArray[np.uint64] = entries >> np.uint64(_MIB_SHIFT) << np.uint64(_MIB_SHIFT)
    return result


def pack_entries(
    states: npt.NDArray[np.uint64], offsets: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Entries of these states and offsets (bytes, multiples of 1 MiB)."""
    result: npt.NDArray[np.uint64] = states | offsets
    return result
