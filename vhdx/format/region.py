# SPDX-License-Identifier: MIT
"""Region tables ([MS-VHDX] 2.2.3)."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from uuid import UUID

from vhdx.errors import DamagedError, Reason
from vhdx.format.checksum import seal, verify
from vhdx.format.header import HEADER_SECTION
from vhdx.units import KIB, MIB

__all__ = [
    "BAT",
    "METADATA",
    "TABLE_OFFSETS",
    "TABLE_SIZE",
    "Region",
    "check_regions",
    "find_reserved",
    "pack_table",
    "parse_table",
]

TABLE_OFFSETS = (192 * KIB, 256 * KIB)
TABLE_SIZE = 64 * KIB
BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

_HEADER = struct.Struct("<4sIII")
_ENTRY = struct.Struct("<16sQII")
assert _HEADER.size == 16
assert _ENTRY.size == 32
_MOST_ENTRIES = 2047


@dataclass(frozen=True)
class Region:
    """A region of the file; offset and length in bytes."""

    guid: UUID
    offset: int
    length: int
    required: bool

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


def pack_table(regions: list[Region]) -> bytes:
    """The 64 KiB on disk, with checksum."""
    data = bytearray(TABLE_SIZE)
    _HEADER.pack_into(data, 0, b"regi", 0, len(regions), 0)
    for i, region in enumerate(regions):
        _ENTRY.pack_into(
            data,
            16 + 32 * i,
            region.guid.bytes_le,
            region.offset,
            region.length,
            int(region.required),
        )
    seal(data)
    return bytes(data)


def parse_table(data: bytes) -> list[Region] | None:
    """The regions in ``data`` (64 KiB), or None if it is not a valid table."""
    if len(data) != TABLE_SIZE or data[:4] != b"regi" or not verify(data):
        return None
    count = _HEADER.unpack_from(data)[2]
    if count > _MOST_ENTRIES:
        return None
    regions = []
    for i in range(count):
        guid, offset, length, required = _ENTRY.unpack_from(data, 16 + 32 * i)
        regions.append(Region(UUID(bytes_le=guid), offset, length, bool(required & 1)))
    return regions


def find_reserved(data: bytes) -> tuple[int, str] | None:
    """Offset in a valid table of bits that must be zero (2.2.3) but are set, and a message."""
    if any(data[12:16]):
        return 12, "the region table's header has reserved bits"
    for i in range(_HEADER.unpack_from(data)[2]):
        guid, _, _, required = _ENTRY.unpack_from(data, 16 + 32 * i)
        if required & ~1:
            return 16 + 32 * i, f"the entry of region {UUID(bytes_le=guid)} has reserved bits"
    return None


def check_regions(
    regions: list[Region], table_offset: int, log_offset: int, log_length: int
) -> tuple[Region, Region]:
    """Checks a table against all rules and returns its BAT and metadata regions.

    QEMU does not set the Required bit of these two, so the bit is not checked.

    Raises:
        DamagedError: a region is misplaced, listed twice, overlapping, missing, or required and
            unknown.
    """
    known: dict[UUID, Region] = {}
    spans = [(0, HEADER_SECTION, "the header section")]
    if log_length:
        spans.append((log_offset, log_offset + log_length, "the log"))
    for i, region in enumerate(regions):
        where = table_offset + 16 + 32 * i
        if (
            region.offset % MIB
            or region.length % MIB
            or region.length == 0
            or region.offset < HEADER_SECTION
            or region.end >= 1 << 63
        ):
            raise DamagedError(
                f"region {region.guid}, {region.length:#x} bytes at {region.offset:#x}, "
                "is not aligned to 1 MiB or lies outside the file",
                reason=Reason.REGION_TABLE,
                offset=where,
            )
        if region.guid in known:
            raise DamagedError(
                f"region {region.guid} is listed twice", reason=Reason.REGION_TABLE, offset=where
            )
        if region.required and region.guid not in {BAT, METADATA}:
            raise DamagedError(
                f"region {region.guid} is required and unknown",
                reason=Reason.REGION_UNKNOWN_REQUIRED,
                offset=where,
                hint="a newer program made this image; open it there",
            )
        known[region.guid] = region
        spans.append((region.offset, region.end, f"region {region.guid}"))
    spans.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise DamagedError(
                f"{other} overlaps {name}", reason=Reason.REGION_OVERLAP, offset=table_offset
            )
    for guid, name in ((BAT, "BAT"), (METADATA, "metadata")):
        if guid not in known:
            raise DamagedError(
                f"there is no {name} region", reason=Reason.REGION_MISSING, offset=table_offset
            )
    return known[BAT], known[METADATA]
