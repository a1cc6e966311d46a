# SPDX-License-Identifier: MIT
"""The structure of an open VHDX file: everything but its payload, read and validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx.errors import DamagedError, Reason, UnsupportedError, VhdxError
from vhdx.format import header as headers
from vhdx.format import locator, log, metadata, region
from vhdx.format.bat import Geometry
from vhdx.image.overlay import Overlay
from vhdx.image.view import AS_SPECIFIED, View

if TYPE_CHECKING:
    from uuid import UUID

    from vhdx.image.host import HostFile

__all__ = ["Structure", "active_sequence", "read_structure"]


@dataclass(frozen=True)
class Structure:
    """What the metadata of a VHDX file says.

    Attributes:
        creator: of the identifier.
        header: the current one.
        other_header_valid: whether the other copy is valid too.
        bat, metadata_region: where these regions stand.
        regions: all of them, unknown ones included.
        table_damaged: whether the first copy of the region table is bad.
        items: of the metadata table, unknown ones included.
        parameters: of the disk.
        geometry: of the BAT.
        parent: the locator of a differencing image.
        overlay: metadata with the log replayed.
        sequence: what the log holds to replay, or None.
    """

    creator: str
    header: headers.Header
    other_header_valid: bool
    bat: region.Region
    metadata_region: region.Region
    regions: tuple[region.Region, ...]
    table_damaged: bool
    items: tuple[metadata.Item, ...]
    parameters: metadata.DiskParameters
    geometry: Geometry
    parent: locator.ParentLocator | None
    overlay: Overlay
    sequence: log.Sequence | None


def read_structure(host: HostFile, view: View = AS_SPECIFIED) -> Structure:
    """Reads the structure without changing the file; the log is replayed in memory.

    Args:
        host: the file.
        view: what is looked at where there are copies.

    Raises:
        UnsupportedError: it is no VHDX file.
        DamagedError: the specification says that it must be refused.
    """
    try:
        return _read(host, view)
    except VhdxError as error:
        if error.path is None:
            error.path = host.path
        raise


def _read(host: HostFile, view: View) -> Structure:
    leaf = host.leaf
    if leaf.size < 8 or leaf.read(8, 0) != headers.SIGNATURE:
        raise UnsupportedError(
            "it is not a VHDX file",
            reason=Reason.UNKNOWN_FORMAT,
            hint="vhdx info says what it is; VHD and raw images are converted first",
        )
    if leaf.size < headers.HEADER_SECTION:
        raise DamagedError(
            f"the file has {leaf.size} bytes and ends inside its header section",
            reason=Reason.TRUNCATED,
            offset=leaf.size,
        )
    if leaf.size > headers.LARGEST_FILE:
        raise UnsupportedError(f"the file has {leaf.size} bytes, more than 256 TiB")
    creator = headers.parse_creator(leaf.read(headers.IDENTIFIER_SIZE, 0))
    copies = [
        headers.parse_header(leaf.read(headers.HEADER_SIZE, offset), slot)
        for slot, offset in enumerate(headers.HEADER_OFFSETS)
    ]
    header = view.choose_header(copies)
    sequence = active_sequence(host, header, view)
    if sequence is None:
        overlay = Overlay(leaf, [], leaf.size)
    else:
        overlay = Overlay(leaf, log.patches_of(sequence), sequence.head.last_file_offset)
    table_at, regions, damaged = _regions(overlay, view)
    bat, where = region.check_regions(regions, table_at, header.log_offset, header.log_length)
    for each in (bat, where):
        if each.end > overlay.size:
            raise DamagedError(
                f"region {each.guid} ends at {each.end:#x}, past the end of the file",
                reason=Reason.TRUNCATED,
                offset=each.offset,
            )
    items = metadata.parse_table(
        overlay.read(where.offset, metadata.TABLE_SIZE), where.offset, where.length
    )
    values = {
        item.guid: overlay.read(where.offset + item.offset, item.length)
        for item in items
        if not item.is_user and item.guid in metadata.KNOWN
    }
    parameters = metadata.parse_parameters(values, where.offset)
    geometry = Geometry(
        parameters.virtual_size,
        parameters.block_size,
        parameters.logical_sector_size,
        parameters.has_parent,
    )
    if geometry.entries * 8 > bat.length:
        raise DamagedError(
            f"the BAT has room for {bat.length // 8} entries, the disk needs {geometry.entries}",
            reason=Reason.BAT_SIZE,
            offset=bat.offset,
        )
    return Structure(
        creator,
        header,
        copies[1 - header.slot] is not None,
        bat,
        where,
        tuple(regions),
        damaged,
        tuple(items),
        parameters,
        geometry,
        _locator(parameters, values, items, where),
        overlay,
        sequence,
    )


def active_sequence(
    host: HostFile, header: headers.Header, view: View = AS_SPECIFIED
) -> log.Sequence | None:
    """What the log holds to replay; None where its GUID says that it holds nothing.

    Raises:
        DamagedError: it must hold something and does not, or what it says cannot be.
    """
    if header.log_guid == headers.NIL or view.log == 0:
        return None
    if header.log_offset + header.log_length > host.leaf.size:
        raise DamagedError(
            "the log lies outside the file", reason=Reason.TRUNCATED, offset=header.log_offset
        )
    sequence = view.choose_sequence(host.leaf.read(header.log_length, header.log_offset), header)
    if sequence is None:
        raise DamagedError(
            "the log must be replayed and holds no valid sequence",
            reason=Reason.LOG_EMPTY,
            offset=header.log_offset,
            hint="older QEMU versions leave such images after a crash; `qemu-img check` opens them",
        )
    last = max(
        sequence.head.last_file_offset, *(p.offset + p.length for p in log.patches_of(sequence)), 0
    )
    if last > headers.LARGEST_FILE:
        raise DamagedError(
            f"the log makes the file {last:#x} bytes long",
            reason=Reason.LOG_TARGET,
            offset=header.log_offset + sequence.head.offset,
        )
    if host.leaf.size < sequence.head.flushed_file_offset:
        raise DamagedError(
            f"the file has {host.leaf.size:#x} bytes, but had "
            f"{sequence.head.flushed_file_offset:#x} when its log was written",
            reason=Reason.TRUNCATED,
            offset=host.leaf.size,
        )
    return sequence


def _regions(overlay: Overlay, view: View) -> tuple[int, list[region.Region], bool]:
    chosen = view.region_table
    for offset in region.TABLE_OFFSETS if chosen is None else [region.TABLE_OFFSETS[chosen - 1]]:
        found = region.parse_table(overlay.read(offset, region.TABLE_SIZE))
        if found is not None:
            return offset, found, offset != region.TABLE_OFFSETS[0]
    raise DamagedError(
        "neither region table is valid" if chosen is None else f"region table {chosen} is not valid",
        reason=Reason.REGION_TABLE,
        offset=region.TABLE_OFFSETS[0],
    )


def _locator(
    parameters: metadata.DiskParameters,
    values: dict[UUID, bytes],
    items: list[metadata.Item],
    where: region.Region,
) -> locator.ParentLocator | None:
    if not parameters.has_parent:
        return None
    if metadata.PARENT_LOCATOR not in values:
        raise DamagedError(
            "it is a differencing image without a parent locator",
            reason=Reason.PARENT_LOCATOR,
            offset=where.offset,
        )
    at = next(item.offset for item in items if item.guid == metadata.PARENT_LOCATOR)
    return locator.parse_locator(values[metadata.PARENT_LOCATOR], where.offset + at)
