# SPDX-License-Identifier: MIT
"""Metadata region: table and items ([MS-VHDX] 2.6)."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from vhdx.errors import DamagedError, Reason
from vhdx.units import KIB, MIB, TIB

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "INCOMPLETE",
    "KNOWN",
    "LARGEST_DISK",
    "PARENT_LOCATOR",
    "TABLE_SIZE",
    "WRITTEN",
    "DiskParameters",
    "Item",
    "find_reserved",
    "find_reserved_parameters",
    "pack_metadata",
    "parse_parameters",
    "parse_table",
]

TABLE_SIZE = 64 * KIB
LARGEST_DISK = 64 * TIB
"""Bytes of the largest virtual disk (2.6.2.2)."""

FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
# Not in the specification, but in Microsoft's own parser (openvmm known_meta.rs).
CHS_PARAMETERS = UUID("da02d7bc-3d3a-423c-ac88-2a36ab21479b")
PMEM_LABEL = UUID("10e1ae8a-4b7e-4169-a40f-cd70de928393")
INCOMPLETE = UUID("71cc85f0-1b69-4e28-9558-c3bf83ae75d3")

KNOWN = {
    FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR,
    CHS_PARAMETERS,
    PMEM_LABEL,
}

WRITTEN = {
    FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR,
}
"""Items that :func:`pack_metadata` makes from the parameters of the disk."""

_HEADER = struct.Struct("<8sHH20x")
_ENTRY = struct.Struct("<16sIIII")
assert _HEADER.size == 32
assert _ENTRY.size == 32

_MOST_ENTRIES = 2047
_LARGEST_ITEM = 1 * MIB
_IS_USER, _IS_VIRTUAL_DISK, _IS_REQUIRED = 1, 2, 4
_LEAVE_ALLOCATED, _HAS_PARENT = 1, 2


@dataclass(frozen=True)
class Item:
    """An entry of the metadata table (2.6.1.2).

    Attributes:
        guid: identifies the item.
        offset: bytes from the start of the region; 0 when the item is empty.
        length: bytes.
        is_user, is_virtual_disk, is_required: flags of the entry.
    """

    guid: UUID
    offset: int
    length: int
    is_user: bool
    is_virtual_disk: bool
    is_required: bool


@dataclass(frozen=True)
class DiskParameters:
    """The values of the known items (2.6.2); sizes in bytes."""

    virtual_size: int
    block_size: int
    logical_sector_size: int
    physical_sector_size: int
    disk_id: UUID
    leave_blocks_allocated: bool
    has_parent: bool


def parse_table(data: bytes, region_offset: int, region_length: int) -> list[Item]:
    """The items of the table in ``data`` (64 KiB).

    Raises:
        DamagedError: there is no valid table, or an item is invalid, or required and unknown.
    """

    def refuse(message: str, where: int, reason: Reason = Reason.METADATA_TABLE) -> DamagedError:
        return DamagedError(message, reason=reason, offset=region_offset + where)

    signature, _, count = _HEADER.unpack_from(data)
    if signature != b"metadata" or count > _MOST_ENTRIES:
        raise refuse("the metadata table has no valid header", 0)
    items: dict[tuple[UUID, bool], Item] = {}
    for i in range(count):
        where = 32 + 32 * i
        guid_bytes, offset, length, flags, _ = _ENTRY.unpack_from(data, where)
        guid = UUID(bytes_le=guid_bytes)
        item = Item(
            guid,
            offset,
            length,
            bool(flags & _IS_USER),
            bool(flags & _IS_VIRTUAL_DISK),
            bool(flags & _IS_REQUIRED),
        )
        if length > _LARGEST_ITEM or (
            offset < TABLE_SIZE or offset + length > region_length if length else offset
        ):
            raise refuse(f"metadata item {guid} is misplaced", where)
        if guid == INCOMPLETE and not item.is_user:
            raise refuse(
                "the image was never finished: its creation was interrupted",
                where,
                Reason.INCOMPLETE,
            )
        if item.is_required and (item.is_user or guid not in KNOWN):
            raise refuse(
                f"metadata item {guid} is required and unknown",
                where,
                Reason.METADATA_UNKNOWN_REQUIRED,
            )
        if (guid, item.is_user) in items:
            raise refuse(f"metadata item {guid} is listed twice", where)
        items[guid, item.is_user] = item
    spans = sorted((item.offset, item.length) for item in items.values() if item.length)
    for (offset, length), (following, _) in itertools.pairwise(spans):
        if following < offset + length:
            raise refuse("metadata items overlap", 0)
    return list(items.values())


def find_reserved(data: bytes) -> tuple[int, str] | None:
    """Offset in a valid table of bits that must be zero (2.6.1) but are set, and a message."""
    if any(data[8:10]) or any(data[12:32]):
        return 8, "the metadata table's header has reserved bits"
    for i in range(_HEADER.unpack_from(data)[2]):
        guid, _, _, flags, reserved = _ENTRY.unpack_from(data, 32 + 32 * i)
        if flags & ~(_IS_USER | _IS_VIRTUAL_DISK | _IS_REQUIRED) or reserved:
            return 32 + 32 * i, f"the entry of metadata item {UUID(bytes_le=guid)} has reserved bits"
    return None


def find_reserved_parameters(values: dict[UUID, bytes]) -> str | None:
    """A message if the valid file parameters set bits that must be zero (2.6.2.1)."""
    flags = struct.unpack("<II", values[FILE_PARAMETERS])[1]
    return "the file parameters have reserved bits" if flags & ~3 else None


def _power_of_two(value: int, low: int, high: int) -> bool:
    return low <= value <= high and value & (value - 1) == 0


def parse_parameters(values: dict[UUID, bytes], region_offset: int) -> DiskParameters:
    """The parameters of the disk from the bytes of its known items.

    Raises:
        DamagedError: an item is missing, or has a wrong length or an invalid value.
    """

    def number(guid: UUID, name: str, layout: str) -> tuple[int, ...]:
        data = values.get(guid)
        if data is None:
            raise DamagedError(
                f"the {name} is missing", reason=Reason.METADATA_MISSING, offset=region_offset
            )
        if len(data) != struct.calcsize(layout):
            raise refuse(name, f"{len(data)} bytes long")
        return struct.unpack(layout, data)

    def refuse(name: str, value: object) -> DamagedError:
        return DamagedError(
            f"the {name} is {value}", reason=Reason.METADATA_ITEM, offset=region_offset
        )

    block_size, flags = number(FILE_PARAMETERS, "file parameters item", "<II")
    if not _power_of_two(block_size, MIB, 256 * MIB):
        raise refuse("block size", block_size)
    (logical,) = number(LOGICAL_SECTOR_SIZE, "logical sector size", "<I")
    if logical not in {512, 4096}:
        raise refuse("logical sector size", logical)
    (physical,) = number(PHYSICAL_SECTOR_SIZE, "physical sector size", "<I")
    if physical not in {512, 4096}:
        raise refuse("physical sector size", physical)
    (size,) = number(VIRTUAL_DISK_SIZE, "virtual disk size", "<Q")
    if size == 0 or size > LARGEST_DISK or size % logical:
        raise refuse("virtual disk size", size)
    number(VIRTUAL_DISK_ID, "virtual disk id", "<16s")
    return DiskParameters(
        virtual_size=size,
        block_size=block_size,
        logical_sector_size=logical,
        physical_sector_size=physical,
        disk_id=UUID(bytes_le=values[VIRTUAL_DISK_ID]),
        leave_blocks_allocated=bool(flags & _LEAVE_ALLOCATED),
        has_parent=bool(flags & _HAS_PARENT),
    )


def pack_metadata(
    parameters: DiskParameters,
    parent_locator: bytes | None = None,
    items: Sequence[tuple[Item, bytes]] = (),
) -> bytes:
    """Table and items, in the order and at the offsets that Windows uses.

    The bytes go to the start of the metadata region.

    Args:
        parameters: of the disk.
        parent_locator: of a differencing image.
        items: additional items, with their content; their offsets are ignored.
    """
    flags = (_LEAVE_ALLOCATED if parameters.leave_blocks_allocated else 0) | (
        _HAS_PARENT if parameters.has_parent else 0
    )
    disk = _IS_VIRTUAL_DISK | _IS_REQUIRED
    values = [
        (FILE_PARAMETERS, struct.pack("<II", parameters.block_size, flags), _IS_REQUIRED),
        (VIRTUAL_DISK_SIZE, struct.pack("<Q", parameters.virtual_size), disk),
        (LOGICAL_SECTOR_SIZE, struct.pack("<I", parameters.logical_sector_size), disk),
        (PHYSICAL_SECTOR_SIZE, struct.pack("<I", parameters.physical_sector_size), disk),
        (VIRTUAL_DISK_ID, parameters.disk_id.bytes_le, disk),
    ]
    if parent_locator is not None:
        values.append((PARENT_LOCATOR, parent_locator, _IS_REQUIRED))
    for item, value in items:
        more = (item.is_user, _IS_USER), (item.is_virtual_disk, _IS_VIRTUAL_DISK)
        kept = sum(flag for is_set, flag in (*more, (item.is_required, _IS_REQUIRED)) if is_set)
        values.append((item.guid, value, kept))
    table = bytearray(TABLE_SIZE)
    _HEADER.pack_into(table, 0, b"metadata", 0, len(values))
    contents = bytearray()
    for i, (guid, value, item_flags) in enumerate(values):
        _ENTRY.pack_into(
            table,
            32 + 32 * i,
            guid.bytes_le,
            TABLE_SIZE + len(contents) if value else 0,
            len(value),
            item_flags,
            0,
        )
        contents += value
    return bytes(table + contents)
