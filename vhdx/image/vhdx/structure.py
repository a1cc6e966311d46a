# SPDX-License-Identifier: MIT
"""The structure of an open VHDX file: everything but its payload, read and validated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx.errors import DamagedError, Reason, UnsupportedError, VhdxError
from vhdx.format import header as headers
from vhdx.format import locator, log, metadata, region
from vhdx.format.bat import Geometry
from vhdx.image.vhdx.overlay import Overlay
from vhdx.image.vhdx.view import AS_SPECIFIED, View

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from vhdx.place import ImageFile

__all__ = ["Structure", "active_sequence", "find_refusals", "read_structure"]


@dataclass(frozen=True)
class Structure:
    """The metadata of a VHDX file.

    Attributes:
        creator: the creator string of the file identifier.
        header: the current header.
        other_header_valid: whether the other copy is valid too.
        bat, metadata_region: the entries of these regions.
        regions: all of them, unknown ones included.
        items: of the metadata table, unknown ones included.
        parameters: of the disk.
        geometry: of the BAT.
        parent: the locator of a differencing image.
        overlay: metadata with the log replayed.
        sequence: the log sequence to replay, or None.
        refusals: errors that are harmless for reading, but forbid writing.
    """

    creator: str
    header: headers.Header
    other_header_valid: bool
    bat: region.Region
    metadata_region: region.Region
    regions: tuple[region.Region, ...]
    items: tuple[metadata.Item, ...]
    parameters: metadata.DiskParameters
    geometry: Geometry
    parent: locator.ParentLocator | None
    overlay: Overlay
    sequence: log.Sequence | None
    refusals: tuple[DamagedError, ...] = ()


def read_structure(host: ImageFile, view: View = AS_SPECIFIED) -> Structure:
    """Reads the structure without changing the file; the log is replayed in memory.

    Args:
        host: the file.
        view: which copies of the structures to read.

    Raises:
        UnsupportedError: it is not a VHDX file.
        DamagedError: the specification requires that the file is refused.
    """
    try:
        return _read(host, view)
    except VhdxError as error:
        if error.path is None:
            error.path = host.path
        raise


def _read(host: ImageFile, view: View) -> Structure:
    leaf = host.leaf
    if leaf.size < 8 or leaf.read(8, 0) != headers.SIGNATURE:
        raise UnsupportedError(
            "it is not a VHDX file",
            reason=Reason.UNKNOWN_FORMAT,
            hint="vhdx info shows its format; convert VHD and raw images first",
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
    table_at, regions = _regions(overlay, view)
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
    parent = _locator(parameters, values, items, where)
    return Structure(
        creator,
        header,
        copies[1 - header.slot] is not None,
        bat,
        where,
        tuple(regions),
        tuple(items),
        parameters,
        geometry,
        parent,
        overlay,
        sequence,
        tuple(find_refusals(overlay, where, values, parent)),
    )


def find_refusals(
    overlay: Overlay,
    where: region.Region,
    values: dict[UUID, bytes],
    parent: locator.ParentLocator | None,
) -> Iterator[DamagedError]:
    """Yields errors that other implementations refuse, and differences between two copies.

    Args:
        overlay: the file.
        where: the metadata region.
        values: of the known metadata items.
        parent: locator of a differencing image.
    """
    tables = [overlay.read(at, region.TABLE_SIZE) for at in region.TABLE_OFFSETS]
    parsed = [region.parse_table(table) for table in tables]
    if parsed[0] is not None and parsed[1] is not None and parsed[0] != parsed[1]:
        yield DamagedError(
            f"the two region tables disagree: {_difference(parsed[0], parsed[1])}",
            reason=Reason.REGION_TABLE,
            offset=region.TABLE_OFFSETS[1],
            hint="check --repair makes the second like the first",
        )
    for at, table, regions in zip(region.TABLE_OFFSETS, tables, parsed, strict=True):
        found = None if regions is None else region.find_reserved(table)
        if found is not None:
            yield DamagedError(found[1], reason=Reason.REGION_TABLE, offset=at + found[0])
    reserved = metadata.find_reserved(overlay.read(where.offset, metadata.TABLE_SIZE))
    if reserved is not None:
        yield DamagedError(
            reserved[1], reason=Reason.METADATA_TABLE, offset=where.offset + reserved[0]
        )
    message = metadata.find_reserved_parameters(values)
    if message is not None:
        yield DamagedError(message, reason=Reason.METADATA_ITEM, offset=where.offset)
    if parent is not None and any("\0" in key for key in parent.entries):
        yield DamagedError(
            "a key of the parent locator holds a NUL character",
            reason=Reason.PARENT_LOCATOR,
            offset=where.offset,
        )


def _difference(first: list[region.Region], second: list[region.Region]) -> str:
    """Describes the first difference between two region tables."""
    for one, other in itertools.zip_longest(first, second):
        if one != other:
            shown = [
                "nothing" if each is None else f"{each.length:#x} bytes at {each.offset:#x}"
                for each in (one, other)
            ]
            guid = (one or other).guid
            return f"region {guid} has {shown[0]} in the first and {shown[1]} in the second"
    return "their entries are in different order"


def active_sequence(
    host: ImageFile, header: headers.Header, view: View = AS_SPECIFIED
) -> log.Sequence | None:
    """The log sequence to replay; None if the LogGuid is nil or the view skips the log.

    Raises:
        DamagedError: there is no valid sequence, or the sequence does not fit the file.
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
            "the log must be replayed, but holds no valid sequence",
            reason=Reason.LOG_EMPTY,
            offset=header.log_offset,
            hint="older QEMU versions leave such images after a crash; `qemu-img check` opens them",
        )
    last = max(
        sequence.head.last_file_offset, *(p.offset + p.length for p in log.patches_of(sequence)), 0
    )
    if last > headers.LARGEST_FILE:
        raise DamagedError(
            f"replaying the log would make the file {last:#x} bytes long",
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


def _regions(overlay: Overlay, view: View) -> tuple[int, list[region.Region]]:
    chosen = view.region_table
    for offset in region.TABLE_OFFSETS if chosen is None else [region.TABLE_OFFSETS[chosen - 1]]:
        found = region.parse_table(overlay.read(offset, region.TABLE_SIZE))
        if found is not None:
            return offset, found
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
