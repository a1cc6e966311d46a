# SPDX-License-Identifier: MIT
"""The label of a physical disk: which pool it belongs to, and where its parts are. No I/O.

A disk begins with two labels of 4 KiB, which are written in turn. All numbers are little-endian::

    0  signature "vlsd"            4  CRC-32C of all, this field zero
    8  version (1)                12  flags: 1 the disk left its pool
   16  pool (UUID)                32  disk (UUID)
   48  generation: one more than that of the last label
   56  bytes of the disk          64  bytes of a slab
   72  offset of the ledger's region
   80  bytes of the ledger's region
   88  offset of slab 0           96  count of slabs
  104  bytes of the pool's name  106  bytes of the disk's name
  108  the pool's name, then the disk's, UTF-8, at most 255 bytes each

Recovery. A label counts if its checksum is right; of the two, that with the higher generation.
Names are hints for people who look at a single disk: the ledger has the true ones.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from uuid import UUID

from vhdx.errors import UnsupportedError
from vhdx.format.checksum import seal, verify
from vhdx.units import MIB

__all__ = [
    "LABEL",
    "LARGEST_NAME",
    "Label",
    "new_label",
    "newest_label",
    "parse_label",
    "place_parts",
]

LABEL = 4096
"""Bytes of a label; there are two."""
LARGEST_NAME = 255
"""Bytes of a name, in UTF-8."""

_VERSION = 1
_LEFT = 1
_REGION = 64 << 10  # where the ledger begins
_LARGEST_REGION = 64 * MIB
_HEAD = struct.Struct("<4sIII16s16sQQQQQQQHH")


@dataclass(frozen=True)
class Label:
    """What a disk says about itself; sizes and offsets in bytes."""

    pool: UUID
    disk: UUID
    generation: int
    size: int
    slab: int
    region_offset: int
    region_length: int
    slabs_offset: int
    slabs: int
    pool_name: str
    disk_name: str
    has_left: bool = False

    def pack(self) -> bytes:
        """The label as written."""
        names = [self.pool_name.encode(), self.disk_name.encode()]
        head = _HEAD.pack(
            b"vlsd", 0, _VERSION, _LEFT if self.has_left else 0, self.pool.bytes, self.disk.bytes,
            self.generation, self.size, self.slab, self.region_offset, self.region_length,
            self.slabs_offset, self.slabs, *map(len, names),
        )  # fmt: skip
        block = bytearray((head + b"".join(names)).ljust(LABEL, b"\0"))
        seal(block)
        return bytes(block)

    @property
    def place(self) -> int:
        """The offset of this label on the disk."""
        return self.generation % 2 * LABEL

    def next(self, *, pool_name: str, disk_name: str, has_left: bool = False) -> Label:
        """The label that replaces this one."""
        return replace(
            self,
            generation=self.generation + 1,
            pool_name=pool_name,
            disk_name=disk_name,
            has_left=has_left,
        )


def place_parts(size: int, slab: int) -> tuple[int, int, int]:
    """Where the parts of a disk of so many bytes lie.

    The ledger gets a sixteenth of the disk, 64 KiB to 64 MiB; slabs follow at a multiple of 1 MiB,
    or of the slab if that is smaller.

    Returns:
        Bytes of the ledger's region, the offset of slab 0, and the count of slabs (0: too small).
    """
    region = max(64 << 10, min(_LARGEST_REGION, size // 16)) // LABEL * LABEL
    alignment = min(MIB, slab)
    first = -(-(_REGION + region) // alignment) * alignment
    return region, first, max(0, (size - first) // slab)


def new_label(
    pool: UUID, disk: UUID, *, size: int, slab: int, pool_name: str, disk_name: str
) -> Label:
    """The first label of a disk."""
    region, first, slabs = place_parts(size, slab)
    return Label(pool, disk, 1, size, slab, _REGION, region, first, slabs, pool_name, disk_name)


def parse_label(block: bytes) -> Label | None:
    """The label, or None if this is none.

    Raises:
        UnsupportedError: a newer version wrote it.
    """
    fields = _HEAD.unpack_from(block)
    signature, _, version, flags, pool, disk = fields[:6]
    if signature != b"vlsd" or not verify(block):
        return None
    if version > _VERSION:
        raise UnsupportedError(f"the label has version {version}, and this program knows {_VERSION}")
    generation, size, slab, offset, length, first, slabs, pool_name, disk_name = fields[6:]
    is_sound = (
        slab >= 64 << 10
        and not slab & (slab - 1)
        and offset % LABEL == 0
        and 2 * LABEL <= offset < offset + length <= first
        and first + slabs * slab <= size < 1 << 62
        and max(pool_name, disk_name) <= LARGEST_NAME
    )
    if version != _VERSION or not is_sound:
        return None
    at = _HEAD.size + pool_name
    return Label(
        UUID(bytes=pool), UUID(bytes=disk), generation, size, slab, offset, length, first, slabs,
        block[_HEAD.size : at].decode(errors="replace"),
        block[at : at + disk_name].decode(errors="replace"),
        bool(flags & _LEFT),
    )  # fmt: skip


def newest_label(blocks: bytes) -> Label | None:
    """The label that counts in the first 8192 bytes of a disk."""
    found = [parse_label(blocks[at : at + LABEL]) for at in (0, LABEL)]
    valid = [label for label in found if label is not None]
    return max(valid, key=lambda label: label.generation, default=None)
