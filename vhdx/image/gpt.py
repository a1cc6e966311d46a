# SPDX-License-Identifier: MIT
"""Moves the backup GPT when the size of a disk changes (UEFI 2.10, 5.3).

The backup GPT is in the last sectors of the disk, and the primary GPT records its location. If the
disk grows, the backup is no longer at the end; if the disk shrinks, the backup is cut off. The new
backup is durable before the primary refers to it, so after a crash there is a valid table. No guest
may use the disk meanwhile: a running guest keeps its own copy of the table.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vhdx.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    Read = Callable[[int, int], bytes]

__all__ = ["Moved", "plan_move"]

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_LARGEST_ARRAY = 1 << 20
_MBR_ENTRY, _MBR_ENTRIES = 16, 4
_PROTECTIVE = 0xEE
_HINT = "repair it in the guest (sgdisk -v, gdisk) first"


@dataclass(frozen=True)
class _Header:
    """The fields of a GPT header: locations in sectors, ``length`` and ``entry_size`` in bytes."""

    signature: bytes
    revision: int
    length: int
    checksum: int
    reserved: int
    mine: int
    alternate: int
    first_usable: int
    last_usable: int
    disk: bytes
    entries_at: int
    count: int
    entry_size: int
    entries_checksum: int
    rest: bytes  # of the sector, after the fields

    @staticmethod
    def parse(sector: bytes) -> _Header | None:
        """The header in a sector, or None if it is not valid."""
        fields: list[Any] = [*_HEADER.unpack_from(sector), sector[_HEADER.size :]]
        header = _Header(*fields)
        if header.signature != b"EFI PART" or not _HEADER.size <= header.length <= len(sector):
            return None
        plain = sector[:16] + bytes(4) + sector[20 : header.length]
        return header if zlib.crc32(plain) == header.checksum else None

    def pack(self) -> bytes:
        """The sector on disk, with the header's checksum."""
        fields = [getattr(self, name) for name in list(self.__dataclass_fields__)[:-1]]
        fields[3] = 0
        plain = _HEADER.pack(*fields) + self.rest
        return plain[:16] + struct.pack("<I", zlib.crc32(plain[: self.length])) + plain[20:]


@dataclass(frozen=True)
class Moved:
    """The writes of a move. Each field is a list of (offset in the disk in bytes, data).

    Attributes:
        backup: entries and header of the backup GPT.
        primary: the primary header, and the protective MBR.
    """

    backup: list[tuple[int, bytes]]
    primary: list[tuple[int, bytes]]


def plan_move(read: Read, size: int, new_size: int, sector: int) -> Moved | None:
    """The writes that adapt the GPT of a disk to a new size.

    Args:
        read: returns bytes of the disk, called with (length, offset).
        size, new_size: of the disk before and after the change, bytes.
        sector: logical sector size, bytes.

    Returns:
        None if the disk has no GPT, or one that fits already.

    Raises:
        InvalidArgumentError: the primary GPT is not valid, or a partition is in the way.
    """
    if size < 3 * sector:
        return None
    first = _Header.parse(read(sector, sector))
    if first is None:
        if _protective(read, new_size // sector):
            raise InvalidArgumentError("its primary GPT header is not valid", hint=_HINT)
        return None
    total = first.count * first.entry_size
    outside = first.entries_at * sector + total > size
    behind = first.entries_at - 1 + -(-total // sector)
    odd = first.entry_size < 128 or first.entry_size & (first.entry_size - 1)
    misplaced = first.mine != 1 or first.entries_at < 2 or behind >= first.first_usable
    if odd or misplaced or outside or total > _LARGEST_ARRAY:
        raise InvalidArgumentError("its primary GPT is not valid", hint=_HINT)
    entries = read(total, first.entries_at * sector)
    if zlib.crc32(entries) != first.entries_checksum:
        raise InvalidArgumentError("the entries of its GPT have a wrong checksum", hint=_HINT)
    last = new_size // sector - 1
    entries_at = last - -(-total // sector)
    furthest = max((_ends(entries, first.entry_size)), default=first.first_usable - 1)
    if entries_at <= max(furthest, first.first_usable):
        raise InvalidArgumentError(
            f"there is no room for the backup GPT behind sector {furthest}",
            hint="make the last partition smaller in the guest first",
        )
    mbr = _protective(read, new_size // sector)
    if (first.alternate, first.last_usable) == (last, entries_at - 1) and all(
        read(len(data), at) == data for at, data in mbr
    ):
        return None
    primary = replace(first, alternate=last, last_usable=entries_at - 1)
    backup = replace(primary, mine=last, alternate=1, entries_at=entries_at)
    return Moved(
        [(entries_at * sector, entries), (last * sector, backup.pack())],
        [(sector, primary.pack()), *mbr],
    )


def _ends(entries: bytes, entry_size: int) -> list[int]:
    """The last sector of each partition."""
    return [
        struct.unpack_from("<Q", entries, at + 40)[0]
        for at in range(0, len(entries) - entry_size + 1, entry_size)
        if any(entries[at : at + 16])
    ]


def _protective(read: Read, sectors: int) -> list[tuple[int, bytes]]:
    """The write that adapts a protective MBR to ``sectors``; empty if the disk has none."""
    data = bytearray(read(512, 0))
    for at in range(446, 446 + _MBR_ENTRIES * _MBR_ENTRY, _MBR_ENTRY):
        if data[at + 4] == _PROTECTIVE and struct.unpack_from("<I", data, at + 8)[0] == 1:
            struct.pack_into("<I", data, at + 12, min(sectors - 1, 0xFFFFFFFF))
            return [(0, bytes(data))]
    return []
