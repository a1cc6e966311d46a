# SPDX-License-Identifier: MIT
"""Reads on-disk structures, even damaged ones, without changing or locking the file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vhdx.arrays import np
from vhdx.errors import InvalidArgumentError, UnsupportedError
from vhdx.format import bat, log, metadata, region
from vhdx.format import header as headers
from vhdx.image.host import open_file
from vhdx.image.vhdx.structure import Structure, read_structure
from vhdx.image.vhdx.view import AS_SPECIFIED, View
from vhdx.place import ImageFile

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HEXADECIMAL", "SECTIONS", "dump"]

SECTIONS = ("headers", "regions", "metadata", "bat", "log")
HEXADECIMAL = frozenset({"offset", "log_offset", "tail", "file_offset", "end"})
_ENTRIES_AT_ONCE = 1 << 14


def dump(
    path: str | os.PathLike[str], section: str, view: View = AS_SPECIFIED
) -> Iterator[dict[str, Any]]:
    """Records of one section ("headers", "regions", "metadata", "bat", "log") of a VHDX file.

    Args:
        path: of the file.
        section: name of the section.
        view: which copies of the structures lead to the section.

    Raises:
        InvalidArgumentError: the section is unknown.
        NotFoundError, HostIOError, UnsupportedError: it cannot be read, or is not a VHDX file.
        DamagedError: a structure that leads to the section is damaged.
    """
    if section not in SECTIONS:
        raise InvalidArgumentError(
            f"the section {section!r} is unknown", hint=f"choose {', '.join(SECTIONS)}"
        )
    host = open_file(path, write=False, locked=False)
    try:
        if host.leaf.size < 8 or host.leaf.read(8, 0) != headers.SIGNATURE:
            raise UnsupportedError("it is not a VHDX file", path=path)
        yield from _READERS[section](host, view)
    finally:
        host.close()


def _piece(host: ImageFile, offset: int, length: int) -> bytes:
    return host.leaf.read(max(0, min(length, host.leaf.size - offset)), min(offset, host.leaf.size))


def _headers(host: ImageFile, view: View) -> Iterator[dict[str, Any]]:
    del view  # both are shown
    identifier = _piece(host, 0, headers.IDENTIFIER_SIZE)
    yield {"structure": "identifier", "offset": 0, "creator": headers.parse_creator(identifier)}
    for slot, offset in enumerate(headers.HEADER_OFFSETS):
        found = headers.parse_header(_piece(host, offset, headers.HEADER_SIZE), slot)
        record: dict[str, Any] = {"structure": f"header {slot + 1}", "offset": offset}
        if found is None:
            yield record | {"valid": False}
            continue
        yield record | {
            "valid": True,
            "sequence_number": found.sequence_number,
            "file_write_guid": str(found.file_write_guid),
            "data_write_guid": str(found.data_write_guid),
            "log_guid": str(found.log_guid),
            "log_version": found.log_version,
            "version": found.version,
            "log_offset": found.log_offset,
            "log_length": found.log_length,
        }


def _regions(host: ImageFile, view: View) -> Iterator[dict[str, Any]]:
    del view  # both are shown
    for number, offset in enumerate(region.TABLE_OFFSETS, 1):
        found = region.parse_table(_piece(host, offset, region.TABLE_SIZE))
        if found is None:
            yield {"table": number, "offset": offset, "valid": False}
            continue
        names = {region.BAT: "BAT", region.METADATA: "metadata"}
        for each in found:
            yield {
                "table": number,
                "valid": True,
                "guid": str(each.guid),
                "name": names.get(each.guid, "unknown"),
                "offset": each.offset,
                "length": each.length,
                "required": each.required,
            }


def _metadata(host: ImageFile, view: View) -> Iterator[dict[str, Any]]:
    structure = read_structure(host, view)
    known = {
        value: name.lower()
        for name, value in vars(metadata).items()
        if name.isupper() and type(value).__name__ == "UUID"
    }
    for item in structure.items:
        at = structure.metadata_region.offset + item.offset
        data = structure.overlay.read(at, min(item.length, 64)) if item.length else b""
        yield {
            "name": known.get(item.guid, "unknown"),
            "guid": str(item.guid),
            "offset": at if item.length else 0,
            "length": item.length,
            "user": item.is_user,
            "virtual_disk": item.is_virtual_disk,
            "required": item.is_required,
            "data": data.hex(),
        }
    if structure.parent is not None:
        for key, value in structure.parent.entries.items():
            yield {"name": "parent_locator", "key": key, "value": value}


def _entry_names(structure: Structure) -> tuple[dict[int, str], int]:
    return {state.value: state.name for state in bat.BlockState}, structure.geometry.chunk_ratio


def _bat(host: ImageFile, view: View) -> Iterator[dict[str, Any]]:
    structure = read_structure(host, view)
    names, ratio = _entry_names(structure)
    total = structure.geometry.entries
    for first in range(0, total, _ENTRIES_AT_ONCE):
        count = min(_ENTRIES_AT_ONCE, total - first)
        at = structure.bat.offset + first * bat.ENTRY_SIZE
        values = np.frombuffer(structure.overlay.read(at, count * bat.ENTRY_SIZE), "<u8")
        for i in np.flatnonzero(values).tolist():
            value, index = int(values[i]), first + i
            chunk, within = divmod(index, ratio + 1)
            block = chunk * ratio + within
            kind = "sector_bitmap" if within == ratio else "payload"
            state = value & 7
            yield {
                "index": index,
                "offset": at + i * bat.ENTRY_SIZE,
                "kind": kind,
                "block": chunk if kind == "sector_bitmap" else block,
                "state": names.get(state, f"reserved {state}"),
                "file_offset": value >> 20 << 20,
                "reserved": value >> 3 & 0x1FFFF,
            }


def _log(host: ImageFile, view: View) -> Iterator[dict[str, Any]]:
    copies = [
        headers.parse_header(_piece(host, offset, headers.HEADER_SIZE), slot)
        for slot, offset in enumerate(headers.HEADER_OFFSETS)
    ]
    header = view.choose_header(copies)
    data = _piece(host, header.log_offset, header.log_length)
    active: set[int] = set()
    if header.log_guid != headers.NIL:
        sequence = view.choose_sequence(data, header)
        if sequence is not None:
            active = {entry.offset for entry in sequence.entries}
    for at in range(0, len(data) - log.SECTOR + 1, log.SECTOR):
        if data[at : at + 4] != b"loge":
            continue
        guid = log.guid_at(data, at)
        entry = log.parse_entry(data, at, guid, header.log_offset)
        record: dict[str, Any] = {
            "offset": header.log_offset + at,
            "guid": str(guid),
            "valid": entry is not None,
            "active": at in active,
        }
        if entry is not None:
            record |= {
                "sequence_number": entry.sequence_number,
                "tail": entry.tail,
                "length": entry.length,
                "flushed_file_offset": entry.flushed_file_offset,
                "last_file_offset": entry.last_file_offset,
                "patches": [
                    f"{'zero' if p.data is None else 'data'} {p.offset:#x}+{p.length:#x}"
                    for p in entry.patches
                ],
            }
        yield record


_READERS = {
    "headers": _headers,
    "regions": _regions,
    "metadata": _metadata,
    "bat": _bat,
    "log": _log,
}
