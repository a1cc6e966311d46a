# SPDX-License-Identifier: MIT
"""Builds images that no tool makes: damaged ones, and differencing ones with their parents."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import vhdx
from vhdx.format import bat, header, locator, log, metadata, region
from vhdx.format.bat import BlockState, Geometry
from vhdx.units import MIB

BAT_OFFSET = 3 * MIB
LOG_OFFSET = 1 * MIB
PAYLOAD = 4 * MIB


def edit(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def read(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def edit_headers(path: Path, change: Callable[[header.Header], header.Header]) -> None:
    """Rewrites both headers, checksums right."""
    for slot, offset in enumerate(header.HEADER_OFFSETS):
        found = header.parse_header(read(path, offset, header.HEADER_SIZE), slot)
        assert found is not None
        edit(path, offset, change(found).pack())


def edit_regions(path: Path, regions: list[region.Region]) -> None:
    for offset in region.TABLE_OFFSETS:
        edit(path, offset, region.pack_table(regions))


def set_entry(path: Path, index: int, value: int) -> None:
    edit(path, BAT_OFFSET + 8 * index, struct.pack("<Q", value))


def add_log(path: Path, pages: dict[int, bytes], *, guid: UUID | None = None, **fields: int) -> None:
    """Makes the log dirty: one entry that writes ``pages`` at their offsets."""
    import numpy as np

    guid = uuid4() if guid is None else guid
    offsets = np.array(sorted(pages), np.uint64)
    content = np.frombuffer(b"".join(pages[at] for at in sorted(pages)), np.uint8)
    size = path.stat().st_size // MIB * MIB
    entry = log.pack_entry(
        guid,
        fields.get("sequence_number", 1),
        fields.get("tail", 0),
        offsets,
        content.reshape(-1, 4096),
        flushed_file_offset=fields.get("flushed", size),
        last_file_offset=fields.get("last", size),
    )
    edit(path, LOG_OFFSET, entry.tobytes())
    edit_headers(path, lambda h: header.Header(**{**vars(h), "log_guid": guid}))


def make_child(
    path: Path,
    parent: Path,
    size: int,
    *,
    block_size: int = 2 * MIB,
    sector: int = 512,
    sectors: dict[int, bytes] | None = None,
    blocks: dict[int, tuple[BlockState, bytes | None]] | None = None,
    linkage: UUID | None = None,
    relative: str | None = None,
) -> None:
    """A differencing image, as the specification has it and Hyper-V writes it.

    Args:
        path: of the child.
        parent: named by it.
        size, block_size, sector: bytes.
        sectors: content by sector number; their blocks become partially present.
        blocks: states of whole blocks, and the content of those that have one.
        linkage: the parent's DataWriteGuid when None.
        relative: relative_path; beside the child when None.
    """
    if linkage is None:
        with vhdx.open(parent) as disk:
            linkage = UUID(disk.describe()["data_write_id"])
    geometry = Geometry(size, block_size, sector, True)
    entries = [0] * geometry.entries
    at = BAT_OFFSET + geometry.table_length
    body: dict[int, bytes] = {}
    bitmaps: dict[int, bytearray] = {}
    stored: dict[int, bytearray] = {}
    for number, data in (sectors or {}).items():
        block, within = divmod(number * sector, block_size)
        stored.setdefault(block, bytearray(b"\xbb" * block_size))[within : within + sector] = data
        chunk, inside = divmod(block, geometry.chunk_ratio)
        bit = inside * (block_size // sector) + within // sector
        bitmap = bitmaps.setdefault(chunk, bytearray(MIB))
        bitmap[bit // 8] |= 1 << bit % 8
    for block, data in stored.items():
        entries[geometry.index(block)] = BlockState.PARTIALLY_PRESENT | at
        body[at] = bytes(data)
        at += block_size
    for chunk, bitmap in bitmaps.items():
        entries[geometry.bitmap_index(chunk)] = bat.BitmapState.PRESENT | at
        body[at] = bytes(bitmap)
        at += MIB
    for block, (state, content) in (blocks or {}).items():
        entries[geometry.index(block)] = state
        if content is not None:
            entries[geometry.index(block)] |= at
            body[at] = content
            at += block_size
    keys = {
        "parent_linkage": f"{{{linkage}}}",
        "relative_path": relative or f".\\{parent.name}",
        "parent_linkage2": f"{{{header.NIL}}}",
    }
    parameters = metadata.DiskParameters(size, block_size, sector, 4096, uuid4(), False, True)
    first = header.Header(0, 0, uuid4(), uuid4(), header.NIL, 0, 1, LOG_OFFSET, MIB)
    with path.open("wb") as file:
        file.truncate(at)
    edit(path, 0, header.pack_identifier("vhdx tests"))
    for each in (first, first.successor()):
        edit(path, header.HEADER_OFFSETS[each.slot], each.pack())
    edit_regions(
        path,
        [
            region.Region(region.BAT, BAT_OFFSET, geometry.table_length, True),
            region.Region(region.METADATA, 2 * MIB, MIB, True),
        ],
    )
    packed = metadata.pack_metadata(parameters, locator.pack_locator(locator.ParentLocator(keys)))
    edit(path, 2 * MIB, packed)
    edit(path, BAT_OFFSET, struct.pack(f"<{len(entries)}Q", *entries))
    for offset, data in body.items():
        edit(path, offset, data)
