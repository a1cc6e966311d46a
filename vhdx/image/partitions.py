# SPDX-License-Identifier: MIT
"""MBR and GPT partition tables, as far as shrinking a disk needs them (UEFI 2.10, chapter 5).

The guest writes these bytes, so every field is checked before it is used.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx.units import round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int, int], bytes]

__all__ = ["Partition", "PartitionTable", "read_partitions"]

_MBR_ENTRY = struct.Struct("<B3sB3sII")
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
_PROTECTIVE = 0xEE
_LARGEST_ARRAY = 1 << 20
_BACKUP_SECTORS = 33  # entries and header of the backup GPT, behind the last usable sector


@dataclass(frozen=True)
class Partition:
    """One partition; offsets in bytes.

    Attributes:
        number: position in the table, from 1.
        start: first byte.
        end: first byte behind it.
        name: from a GPT; "" for MBR.
    """

    number: int
    start: int
    end: int
    name: str = ""


@dataclass(frozen=True)
class PartitionTable:
    """The partition table of a disk.

    Attributes:
        kind: "mbr" or "gpt".
        partitions: in the table's order.
        readable: False if the MBR announces a GPT and neither of its copies is valid.
        reserved: bytes that the backup GPT needs behind the last partition.
    """

    kind: str
    partitions: tuple[Partition, ...]
    readable: bool = True
    reserved: int = 0

    def minimum_size(self, sector: int) -> int | None:
        """The least size, bytes, that cuts no partition off; None if it is unknown."""
        if not self.readable or not self.partitions:
            return None
        return round_up(max(p.end for p in self.partitions) + self.reserved, sector)

    def last(self) -> Partition | None:
        """The partition with the greatest end, or None."""
        return max(self.partitions, key=lambda p: p.end, default=None)


def read_partitions(read: Read, size: int, sector: int) -> PartitionTable | None:
    """The partition table of a disk, or None if there is none.

    Args:
        read: returns bytes of the disk, called with (length, offset).
        size: of the disk, bytes.
        sector: logical sector size, bytes.
    """
    if size < 2 * sector:
        return None
    first = read(512, 0)
    if first[510:512] != b"\x55\xaa":
        return None
    entries = [_MBR_ENTRY.unpack_from(first, 446 + 16 * i) for i in range(4)]
    if any(entry[0] not in {0, 0x80} for entry in entries):
        return None  # the boot sector of a file system, not an MBR
    used = [(i, e) for i, e in enumerate(entries, 1) if e[2] != 0 and e[5] != 0]
    if any(entry[2] == _PROTECTIVE for _, entry in used):
        return _read_gpt(read, size, sector)
    if not used:
        return None
    partitions = tuple(
        Partition(number, entry[4] * sector, (entry[4] + entry[5]) * sector) for number, entry in used
    )
    return PartitionTable("mbr", partitions)


def _read_gpt(read: Read, size: int, sector: int) -> PartitionTable:
    unreadable = PartitionTable("gpt", (), readable=False)
    for at in (sector, size - sector):
        header = read(sector, at)
        fields = _GPT_HEADER.unpack_from(header)
        signature, _, length, checksum = fields[:4]
        if signature != b"EFI PART" or not _GPT_HEADER.size <= length <= sector:
            continue
        if zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
            continue
        table_lba, count, entry_size, table_checksum = fields[10:14]
        total = count * entry_size
        if entry_size < _GPT_ENTRY.size or total > _LARGEST_ARRAY:
            continue
        if table_lba > size // sector or total > size - table_lba * sector:
            continue
        table = read(total, table_lba * sector)
        if zlib.crc32(table) == table_checksum:
            return PartitionTable(
                "gpt",
                tuple(_gpt_partitions(table, entry_size, sector)),
                reserved=_BACKUP_SECTORS * sector,
            )
    return unreadable


def _gpt_partitions(table: bytes, entry_size: int, sector: int) -> list[Partition]:
    found = []
    for number, at in enumerate(range(0, len(table), entry_size), 1):
        kind, _, first, last, _, name = _GPT_ENTRY.unpack_from(table, at)
        if kind != bytes(16) and first <= last:
            text = name.decode("utf-16-le", "replace").partition("\0")[0]
            found.append(Partition(number, first * sector, (last + 1) * sector, text))
    return found
