# SPDX-License-Identifier: MIT
"""The legacy VHD format: footer, dynamic header, block allocation table.

The source is Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0 (2006); section
names are those of the specification. All numbers are big-endian.
"""

from __future__ import annotations

import datetime
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import PureWindowsPath
from uuid import UUID

from vhdx.errors import DamagedError, Reason, UnsupportedError
from vhdx.units import GIB, KIB, MIB

__all__ = [
    "COOKIE",
    "DEFAULT_BLOCK_SIZE",
    "FOOTER_SIZE",
    "HEADER_SIZE",
    "LARGEST_DISK",
    "SECTOR",
    "UNUSED",
    "DiskType",
    "DynamicHeader",
    "Footer",
    "bitmap_length",
    "geometry_of",
    "new_footer",
    "parse_footer",
    "parse_header",
    "parse_locator",
]

COOKIE = b"conectix"
_HEADER_COOKIE = b"cxsparse"
SECTOR = 512
FOOTER_SIZE = 512
HEADER_SIZE = 1024
UNUSED = 0xFFFFFFFF
"""The block allocation table entry of a block that is not stored."""

LARGEST_DISK = 2040 * GIB
DEFAULT_BLOCK_SIZE = 2 * MIB
_NO_ID = UUID(int=0)
_NONE = 0xFFFFFFFFFFFFFFFF
_VERSION = 0x00010000
_FEATURES = 2  # "reserved", always set
_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_HEADER = struct.Struct(">8sQQIIII16sI4x512s")
_LOCATOR = struct.Struct(">4sIII Q")
_LOCATORS = 8
_SMALLEST_BLOCK, _LARGEST_BLOCK = 4 * KIB, 256 * MIB
_LARGEST_LOCATOR = 64 * KIB
_LARGEST_GEOMETRY = 65535 * 16 * 255

# The creator "vpc " computes a disk's size from its geometry; all others use the size field.
_BY_GEOMETRY = b"vpc "


class DiskType(IntEnum):
    """Disk Type of the footer."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True)
class Footer:
    """Hard Disk Footer Format.

    Attributes:
        data_offset: offset of the dynamic header, bytes; all ones for fixed disks.
        timestamp: seconds since 2000-01-01 UTC.
        creator: four bytes that identify the program.
        creator_version, host_system: uninterpreted.
        original_size, current_size: bytes.
        geometry: cylinders, heads, sectors per track.
        disk_type: fixed, dynamic or differencing.
        unique_id: of the disk.
        saved_state: uninterpreted.
        original: the bytes of the footer as they were read; empty in a new one.
    """

    data_offset: int
    timestamp: int
    creator: bytes
    creator_version: int
    host_system: bytes
    original_size: int
    current_size: int
    geometry: tuple[int, int, int]
    disk_type: DiskType
    unique_id: UUID
    saved_state: int = 0
    original: bytes = b""

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk that a guest sees."""
        cylinders, heads, sectors = self.geometry
        total = cylinders * heads * sectors
        if self.creator == _BY_GEOMETRY and 0 < total < _LARGEST_GEOMETRY:
            return min(total * SECTOR, self.current_size)
        return self.current_size

    def pack(self) -> bytes:
        """The footer with its checksum; a footer that was read is returned unchanged."""
        return self.original or _sealed(
            _FOOTER.pack(
                COOKIE,
                _FEATURES,
                _VERSION,
                self.data_offset,
                self.timestamp,
                self.creator,
                self.creator_version,
                self.host_system,
                self.original_size,
                self.current_size,
                *self.geometry,
                self.disk_type,
                0,
                self.unique_id.bytes,
                self.saved_state,
            ),
            64,
        )


@dataclass(frozen=True)
class DynamicHeader:
    """Dynamic Disk Header Format.

    Attributes:
        table_offset: offset of the block allocation table, bytes.
        entries: number of table entries.
        block_size: bytes, without the sector bitmap.
        parent_id: unique id of a differencing disk's parent.
        parent_timestamp: seconds since 2000-01-01 UTC.
        parent_name: the parent's file name.
        locators: platform code, offset and length (bytes) of each parent locator.
    """

    table_offset: int
    entries: int
    block_size: int
    parent_id: UUID = _NO_ID
    parent_timestamp: int = 0
    parent_name: str = ""
    locators: tuple[tuple[bytes, int, int], ...] = ()

    def pack(self) -> bytes:
        """The header of a dynamic disk, with its checksum."""
        packed = _HEADER.pack(
            _HEADER_COOKIE,
            _NONE,
            self.table_offset,
            _VERSION,
            self.entries,
            self.block_size,
            0,
            self.parent_id.bytes,
            self.parent_timestamp,
            self.parent_name.encode("utf-16-be"),
        )
        return _sealed(packed.ljust(HEADER_SIZE, b"\0"), 36)


def _checksum(data: bytes, at: int) -> int:
    """The one's complement of the sum of all bytes except those of the checksum."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def _sealed(data: bytes, at: int) -> bytes:
    return data[:at] + struct.pack(">I", _checksum(data, at)) + data[at + 4 :]


def bitmap_length(block_size: int) -> int:
    """Bytes of the sector bitmap before each block, rounded up to sectors."""
    return -(-block_size // SECTOR // 8 // SECTOR) * SECTOR


def geometry_of(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track for ``size`` bytes (Appendix: CHS Calculation)."""
    total = min(size // SECTOR, _LARGEST_GEOMETRY)
    if total >= 65535 * 16 * 63:
        sectors, heads = 255, 16
    else:
        sectors = 17
        heads = max(4, -(-(total // sectors) // 1024))
        if total // sectors >= heads * 1024 or heads > 16:
            sectors, heads = 31, 16
        if total // sectors >= heads * 1024:
            sectors, heads = 63, 16
    return total // sectors // heads, heads, sectors


def new_footer(size: int, disk_type: DiskType, unique_id: UUID) -> Footer:
    """The footer of a new disk of ``size`` bytes.

    With its creator, every reader uses the size field and not the geometry.
    """
    now = datetime.datetime.now(datetime.UTC)
    return Footer(
        data_offset=_NONE if disk_type == DiskType.FIXED else FOOTER_SIZE,
        timestamp=int((now - _EPOCH).total_seconds()),
        creator=b"win ",
        creator_version=0x000A0000,
        host_system=b"Wi2k",
        original_size=size,
        current_size=size,
        geometry=geometry_of(size),
        disk_type=disk_type,
        unique_id=unique_id,
    )


def parse_footer(data: bytes) -> Footer | None:
    """The footer in these 512 bytes; None if it is not valid.

    Raises:
        UnsupportedError: the footer is valid, but of an unknown version or type.
    """
    if len(data) != FOOTER_SIZE or data[:8] != COOKIE:
        return None
    fields = _FOOTER.unpack(data)
    if fields[14] != _checksum(data, 64):
        return None
    if fields[2] >> 16 != _VERSION >> 16:
        raise UnsupportedError(f"it is a VHD of version {fields[2]:#x}")
    try:
        disk_type = DiskType(fields[13])
    except ValueError as error:
        raise UnsupportedError(f"it is a VHD of type {fields[13]}") from error
    return Footer(
        data_offset=fields[3],
        timestamp=fields[4],
        creator=fields[5],
        creator_version=fields[6],
        host_system=fields[7],
        original_size=fields[8],
        current_size=fields[9],
        geometry=(fields[10], fields[11], fields[12]),
        disk_type=disk_type,
        unique_id=UUID(bytes=fields[15]),
        saved_state=fields[16],
        original=bytes(data),
    )


def parse_header(data: bytes, offset: int, footer: Footer) -> DynamicHeader:
    """The dynamic header in these 1024 bytes, which begin at ``offset`` of the file.

    Raises:
        DamagedError: the header is not valid, or does not match the footer.
    """

    def refuse(message: str) -> DamagedError:
        return DamagedError(message, reason=Reason.HEADERS, offset=offset)

    if len(data) != HEADER_SIZE or data[:8] != _HEADER_COOKIE:
        raise refuse("there is no dynamic disk header")
    fields = _HEADER.unpack_from(data)
    if fields[6] != _checksum(data, 36):
        raise refuse("the dynamic disk header has a bad checksum")
    block = fields[5]
    if not _SMALLEST_BLOCK <= block <= _LARGEST_BLOCK or block & (block - 1):
        raise refuse(f"the block size is {block} bytes")
    if fields[4] * block < footer.virtual_size:
        raise refuse(f"a table of {fields[4]} entries is too small for the disk")
    locators = []
    for i in range(_LOCATORS):
        code, _, length, _, where = _LOCATOR.unpack_from(data, 576 + i * _LOCATOR.size)
        if code != bytes(4) and 0 < length <= _LARGEST_LOCATOR:
            locators.append((code, where, length))
    return DynamicHeader(
        table_offset=fields[2],
        entries=fields[4],
        block_size=block,
        parent_id=UUID(bytes=fields[7]),
        parent_timestamp=fields[8],
        parent_name=fields[9].decode("utf-16-be", errors="replace").partition("\0")[0],
        locators=tuple(locators),
    )


def parse_locator(code: bytes, data: bytes) -> PureWindowsPath | None:
    """The path in a parent locator; None for codes that hold no path (Parent Locator Entry)."""
    if code not in {b"W2ru", b"W2ku"}:
        return None
    return PureWindowsPath(data.decode("utf-16-le", errors="replace").partition("\0")[0])
