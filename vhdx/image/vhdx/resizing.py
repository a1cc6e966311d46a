# SPDX-License-Identifier: MIT
"""Changes the virtual size of an open VHDX image ([MS-VHDX] 2.5, 2.6.2.2).

Grow: the new part of the BAT is zeroed. If the BAT's region is too small, the BAT first moves to
the end of the file. A fixed image's new blocks are allocated, and the tail of the last block is
zeroed. All of this is durable before one log entry changes the size, the region tables, and entries
that share a page with live entries. So a crash leaves either the old size or the new size.

Shrink: requests behind the new end are refused first. Then one log entry changes the size. Only
then are the entries behind the end cleared and their blocks released.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import InvalidArgumentError, ReadOnlyError, UnsupportedError
from vhdx.format import bat, metadata, region
from vhdx.format.bat import BlockState
from vhdx.image.partitions import read_partitions
from vhdx.image.vhdx.allocation import bat_runs, is_payload
from vhdx.units import MIB, format_size, round_up

if TYPE_CHECKING:
    from vhdx.format.bat import Geometry
    from vhdx.image.vhdx.engine import Engine

    Table = np.ndarray[tuple[int], np.dtype[np.uint64]]

__all__ = ["check_shrink", "grow", "shrink"]

_PAGE = 4096
_COPY = 4 * MIB


def _check(engine: Engine, size: int) -> None:
    path, sector = engine.host.path, engine.structure.parameters.logical_sector_size
    if engine.host.read_only:
        raise ReadOnlyError("it is open for reading only", path=path)
    if not 0 < size <= metadata.LARGEST_DISK:
        raise InvalidArgumentError(
            f"the size is {size} bytes", path=path, hint="choose 1 sector to 64T"
        )
    if size % sector:
        raise InvalidArgumentError(
            f"the size of {size} bytes is no multiple of the logical sector of {sector} bytes",
            path=path,
            hint=f"choose {size // sector * sector or sector}",
        )


def grow(engine: Engine, size: int) -> None:
    """Makes the disk larger; the new part reads as zeros. The caller resizes the map.

    Raises:
        InvalidArgumentError: the size is out of range, or not a multiple of the sector size.
        NoSpaceError: no room for a larger table or a fixed image's blocks; nothing is changed.
    """
    _check(engine, size)
    engine.map.flush()
    with engine.changing() as leaf:
        engine.committer.forget_log()  # entries are cleared in place below
        old = engine.structure.geometry
        new = replace(old, virtual_size=size)
        patches = [_size_patch(engine, size)]
        where = engine.structure.bat
        if new.entries * bat.ENTRY_SIZE > where.length:
            where = _move_table(engine, leaf, new)
            patches += _region_patches(engine, leaf, where)
        first, table = _blank(engine, leaf, old, old, new.entries)
        if engine.structure.parameters.leave_blocks_allocated and not new.has_parent:
            _allocate(engine, leaf, old, new, table)
        live = 0 if where is not engine.structure.bat else old.entries
        patches += _write_table(leaf, where, first, table, live)
        _zero_tail(engine, leaf, old)
        leaf.flush()
        engine.committer.log(patches)
        engine.adopt(new, where)


def _size_patch(engine: Engine, size: int) -> tuple[int, bytes]:
    item = next(i for i in engine.structure.items if i.guid == metadata.VIRTUAL_DISK_SIZE)
    return engine.structure.metadata_region.offset + item.offset, struct.pack("<Q", size)


def _move_table(engine: Engine, leaf: plane.Device, new: Geometry) -> region.Region:
    """Copies the table into a larger region at the end of the file."""
    old = engine.structure.bat
    offset = engine.take_region(new.table_length)
    length = engine.structure.geometry.entries * bat.ENTRY_SIZE
    for extent in leaf.extents(old.offset, length):
        if extent.state != plane.DATA:
            continue
        stop = min(extent.offset + extent.length, old.offset + length)
        for at in range(extent.offset, stop, _COPY):
            data = leaf.read(min(_COPY, stop - at), at)
            if data.count(0) < len(data):
                leaf.write(data, offset + at - old.offset)
    return replace(old, offset=offset, length=new.table_length)


def _region_patches(
    engine: Engine, leaf: plane.Device, moved: region.Region
) -> list[tuple[int, bytes]]:
    """The 4 KiB pages that change in both region tables."""
    regions = [moved if r.guid == region.BAT else r for r in engine.structure.regions]
    table = region.pack_table(regions)
    patches = []
    for base in region.TABLE_OFFSETS:
        before = leaf.read(region.TABLE_SIZE, base)
        patches += [
            (base + at, table[at : at + _PAGE])
            for at in range(0, region.TABLE_SIZE, _PAGE)
            if before[at : at + _PAGE] != table[at : at + _PAGE]
        ]
    return patches


def _blank(
    engine: Engine, leaf: plane.Device, old: Geometry, kept: Geometry, end: int
) -> tuple[int, Table]:
    """Index of the first entry behind the last block of ``kept``, and zeros from there to ``end``.

    Entries of sector bitmaps that ``kept`` still has keep their values. The BAT has all entries of
    a chunk, even if the disk ends inside it.
    """
    first = kept.index(kept.blocks - 1) + 1
    table = np.zeros(end - first, np.uint64)
    if kept.has_parent:
        at = engine.structure.bat.offset
        for chunk in range((kept.blocks - 1) // kept.chunk_ratio, kept.bitmaps):
            index = old.bitmap_index(chunk)
            entry = leaf.read(bat.ENTRY_SIZE, at + index * bat.ENTRY_SIZE)
            table[index - first] = int.from_bytes(entry, "little")
    return first, table


def _write_table(
    leaf: plane.Device, where: region.Region, first: int, table: Table, live: int
) -> list[tuple[int, bytes]]:
    """Writes entries from ``first`` on, except in pages with any of the first ``live`` entries.

    Returns:
        The patch for those pages, which must go through the log.
    """
    at, data = where.offset + first * bat.ENTRY_SIZE, table.astype("<u8").tobytes()
    stop = round_up(live * bat.ENTRY_SIZE, _PAGE) - first * bat.ENTRY_SIZE
    shared = min(len(data), max(0, stop))
    for start in range(shared, len(data), _COPY):
        part = data[start : start + _COPY]
        if any(part):
            leaf.write(part, at + start)
        else:
            leaf.zero(at + start, len(part))
    return [(at, data[:shared])] if shared else []


def _allocate(
    engine: Engine,
    leaf: plane.Device,
    old: Geometry,
    new: Geometry,
    table: Table,
) -> None:
    """Allocates the new blocks of a fixed image, and puts their entries into ``table``."""
    blocks = np.arange(old.blocks, new.blocks, dtype=np.uint64)
    if not len(blocks):
        return
    start = engine.take_region(len(blocks) * new.block_size, len(blocks))
    leaf.zero(start, len(blocks) * new.block_size, no_hole=True)
    offsets = np.uint64(start) + np.arange(len(blocks), dtype=np.uint64) * np.uint64(new.block_size)
    states = np.full(len(blocks), BlockState.FULLY_PRESENT, np.uint64)
    slots = (new.indices(blocks) - np.uint64(old.entries)).astype(np.int64)
    table[slots] = bat.pack_entries(states, offsets)


def _zero_tail(engine: Engine, leaf: plane.Device, old: Geometry) -> None:
    """Zeroes the last block behind the old end, where it may hold stale data."""
    used = old.virtual_size % old.block_size
    if not used:
        return
    last = old.blocks - 1
    at = engine.structure.bat.offset + old.index(last) * bat.ENTRY_SIZE
    entry = np.frombuffer(leaf.read(bat.ENTRY_SIZE, at), "<u8").astype(np.uint64)
    if int(bat.state_of(entry)[0]) >= BlockState.FULLY_PRESENT:
        leaf.zero(int(bat.offset_of(entry)[0]) + used, old.block_size - used)


def check_shrink(
    engine: Engine,
    device: plane.Device,
    size: int,
    parent_size: int | None,
    *,
    unsafe: bool,
    move_gpt: bool,
) -> None:
    """Refuses a size that cuts off a partition or the backup GPT, or exposes the parent.

    Raises:
        InvalidArgumentError: the message says what is in the way.
        UnsupportedError: a differencing image below its parent's size.
    """
    _check(engine, size)
    path = engine.host.path
    if parent_size is not None and size < parent_size:
        raise UnsupportedError(
            f"below {parent_size} bytes, the size of its parent, the parent would show when it "
            "grows again",
            path=path,
            hint="merge or convert it first",
        )
    sector = engine.structure.parameters.logical_sector_size
    table = read_partitions(device.read, device.size, sector)
    if table is None:
        if not unsafe:
            raise InvalidArgumentError(
                "no partition table was found, so nothing says what is in use",
                path=path,
                hint="use --unsafe (unsafe=True) if the file system was shrunk before",
            )
        return
    least = table.minimum_size(sector)
    if least is None:
        what = "is empty" if table.readable else "cannot be read"
        if not (table.readable and unsafe):
            raise InvalidArgumentError(
                f"its {table.kind.upper()} partition table {what}, so nothing says what is in use",
                path=path,
                hint="repair it in the guest"
                if not table.readable
                else "use --unsafe (unsafe=True) if nothing behind the new end is needed",
            )
        return
    if size < least:
        last = table.last()
        assert last is not None
        name = f"partition {last.number}" + (f" ({last.name})" if last.name else "")
        raise InvalidArgumentError(
            f"{name} ends at {last.end} bytes ({format_size(last.end)})"
            + (f", and the backup GPT takes {table.reserved} behind it" if table.reserved else "")
            + f": {least} bytes is the least size",
            path=path,
            hint="choose at least that, or shrink the partition in the guest first",
        )
    if table.kind == "gpt" and not (move_gpt or unsafe):
        raise InvalidArgumentError(
            "its GPT keeps a second copy at the end of the disk, which would be cut off",
            path=path,
            hint="use --move-gpt (move_gpt=True) while no guest uses the disk; or --unsafe, and move "
            "it in the guest (sgdisk -e)",
        )


def shrink(engine: Engine, size: int) -> None:
    """Makes the disk smaller; the caller already refuses requests behind ``size``."""
    engine.map.flush()
    with engine.changing() as leaf:
        engine.committer.forget_log()  # entries are cleared in place below
        old = engine.structure.geometry
        new = replace(old, virtual_size=size)
        indices, values = _entries_behind(engine, leaf, new)
        engine.committer.log([_size_patch(engine, size)])
        try:
            first, blank = _blank(engine, leaf, old, new, old.entries)
            patches = _write_table(leaf, engine.structure.bat, first, blank, new.entries)
            if patches:
                engine.committer.log(patches)
            engine.adopt(new, engine.structure.bat)
            stored = is_payload(replace(engine.structure, geometry=old), indices)
            stored &= bat.state_of(values) >= BlockState.FULLY_PRESENT
            engine.loader.forget(new.blocks, old.blocks)
            engine.allocator.release(bat.offset_of(values[stored]))
        except BaseException:
            engine.map.poison()  # the file has the new size, the engine may have the old one
            raise


def _entries_behind(engine: Engine, leaf: plane.Device, new: Geometry) -> tuple[Table, Table]:
    """Indices and values of the stored entries that a smaller table leaves out."""
    indices, values = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for first, found in bat_runs(engine.structure, leaf):
        keep = max(0, new.index(new.blocks - 1) + 1 - first)
        if keep < len(found):
            values.append(found[keep:])
            indices.append(np.arange(first + keep, first + len(found), dtype=np.uint64))
    return np.concatenate(indices), np.concatenate(values)
