# SPDX-License-Identifier: MIT
"""Creates VHDX files in the layout that Windows uses.

Header section, log at 1 MiB, metadata at 2 MiB, BAT at 3 MiB, payload behind it. Headers are written
last and behind a barrier, so an interrupted create leaves no file that opens.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import InvalidArgumentError, UnsupportedError
from vhdx.format import bat, header, metadata, region
from vhdx.format.bat import BlockState, Geometry
from vhdx.format.locator import pack_locator
from vhdx.image.erasing import erase
from vhdx.image.replacing import new_file
from vhdx.image.reserving import reserve
from vhdx.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vhdx.format.locator import ParentLocator
    from vhdx.interrupts import Cancel, Progress

    StrPath = str | os.PathLike[str]

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "check_parameters",
    "create_vhdx",
    "write_image",
]

DEFAULT_BLOCK_SIZE = 32 * MIB
_CREATOR = "vhdx 0.1.0"
_LOG_OFFSET, _LOG_LENGTH = 1 * MIB, 1 * MIB
_METADATA_OFFSET, _METADATA_LENGTH = 2 * MIB, 1 * MIB
_BAT_OFFSET = 3 * MIB
_BAT_ENTRIES_AT_ONCE = 1 << 20
_PREALLOCATED_BAT = 16 * MIB


def create_vhdx(
    path: StrPath,
    size: int,
    *,
    type: str = "dynamic",
    block_size: int | None = None,
    logical_sector_size: int = 512,
    physical_sector_size: int = 4096,
    sparse: bool = True,
    force: bool = False,
    disk_id: UUID | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Creates an empty image.

    Args:
        path: of the new image; an existing file is refused unless ``force`` is set.
        size: of the virtual disk, bytes: a multiple of the logical sector, 1 sector to 64 TiB.
        type: "dynamic", or "fixed" (all space allocated now).
        block_size: bytes, a power of two from 1 MiB to 256 MiB; 32 MiB when None.
        logical_sector_size: 512 or 4096.
        physical_sector_size: 512 or 4096.
        sparse: False fills a fixed image with zeros, so that the host file has no unwritten
            extents.
        force: replace an existing file.
        disk_id: the virtual disk id (SCSI page 83), random when None.
        progress, cancel: called while a fixed image is allocated; no file is left when ``cancel``
            returns True.

    Raises:
        InvalidArgumentError, ExistsError, NotFoundError, NoSpaceError, HostIOError.
    """
    parameters = check_parameters(
        path,
        size,
        type=type,
        block_size=block_size,
        logical_sector_size=logical_sector_size,
        physical_sector_size=physical_sector_size,
        disk_id=disk_id,
    )
    with new_file(path, force=force, sparse=sparse) as leaf:
        write_image(leaf, parameters, sparse=sparse, progress=progress, cancel=cancel)


def check_parameters(
    path: StrPath,
    size: int,
    *,
    type: str,
    block_size: int | None,
    logical_sector_size: int,
    physical_sector_size: int,
    disk_id: UUID | None = None,
) -> metadata.DiskParameters:
    """The parameters of a new image; see :func:`create_vhdx`.

    Raises:
        InvalidArgumentError: one is out of its range.
    """
    logical, physical = logical_sector_size, physical_sector_size
    block = DEFAULT_BLOCK_SIZE if block_size is None else block_size

    def refuse(message: str, hint: str) -> InvalidArgumentError:
        return InvalidArgumentError(message, path=path, hint=hint)

    if type not in {"dynamic", "fixed", "differencing"}:
        raise refuse(f"the type {type!r} is unknown", "choose dynamic, fixed or differencing")
    if logical not in {512, 4096}:
        raise refuse(f"the logical sector size is {logical}", "choose 512 or 4096")
    if physical not in {512, 4096}:
        raise refuse(f"the physical sector size is {physical}", "choose 512 or 4096")
    if not MIB <= block <= 256 * MIB or block & (block - 1):
        raise refuse(f"the block size is {block}", "choose a power of two from 1M to 256M")
    if size <= 0 or size > metadata.LARGEST_DISK:
        raise refuse(f"the size is {size} bytes", "choose 1 sector to 64T")
    if size % logical:
        below, above = size // logical * logical, (size // logical + 1) * logical
        raise refuse(
            f"the size of {size} bytes is no multiple of the logical sector of {logical} bytes",
            f"choose {below} or {above}" if below else f"choose {above}",
        )
    return metadata.DiskParameters(
        virtual_size=size,
        block_size=block,
        logical_sector_size=logical,
        physical_sector_size=physical,
        disk_id=uuid4() if disk_id is None else disk_id,
        leave_blocks_allocated=type == "fixed",
        has_parent=type == "differencing",
    )


def write_image(
    leaf: plane.Device,
    parameters: metadata.DiskParameters,
    *,
    sparse: bool,
    parent: ParentLocator | None = None,
    items: Sequence[tuple[metadata.Item, bytes]] = (),
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Writes an empty image over an empty leaf, headers last.

    Args:
        leaf: the file.
        parameters: of the disk.
        sparse: whether zeros may stay unallocated on the host.
        parent: locator of a differencing image.
        items: further metadata items, with their content.
        progress, cancel: called while a fixed image is allocated.

    Raises:
        VhdxError: reason CANCELLED when ``cancel`` returned True.
        UnsupportedError: the items have no room.
    """
    geometry = Geometry(
        parameters.virtual_size,
        parameters.block_size,
        parameters.logical_sector_size,
        parameters.has_parent,
    )
    packed = metadata.pack_metadata(
        parameters, None if parent is None else pack_locator(parent), items
    )
    if len(packed) > _METADATA_LENGTH:
        raise UnsupportedError(f"its metadata have {len(packed)} bytes, more than 1 MiB")
    payload = _BAT_OFFSET + geometry.table_length
    fixed = parameters.leave_blocks_allocated
    end = payload + (geometry.blocks * geometry.block_size if fixed else 0)
    leaf.resize(end)
    erase(leaf, payload)
    # Allocate log and BAT now. Without space for them later, data that has space would fail.
    leaf.zero(0, _BAT_OFFSET + min(geometry.table_length, _PREALLOCATED_BAT), no_hole=True)
    if fixed:
        reserve(leaf, payload, end, sparse=sparse, progress=progress, cancel=cancel)
        _fill_bat(leaf, geometry, payload)
    leaf.write(packed, _METADATA_OFFSET)
    table = region.pack_table(
        [
            region.Region(region.BAT, _BAT_OFFSET, geometry.table_length, True),
            region.Region(region.METADATA, _METADATA_OFFSET, _METADATA_LENGTH, True),
        ]
    )
    for offset in region.TABLE_OFFSETS:
        leaf.write(table, offset)
    leaf.write(header.pack_identifier(_CREATOR), 0)
    leaf.flush()
    # A file without a header does not open, so the headers are written when the rest is durable.
    first = header.Header(0, 0, uuid4(), uuid4(), header.NIL, 0, 1, _LOG_OFFSET, _LOG_LENGTH)
    for each in (first, first.successor()):
        leaf.write(each.pack(), header.HEADER_OFFSETS[each.slot])
    leaf.flush()


def _fill_bat(leaf: plane.Device, geometry: Geometry, payload: int) -> None:
    for first in range(0, geometry.blocks, _BAT_ENTRIES_AT_ONCE):
        blocks = np.arange(first, min(first + _BAT_ENTRIES_AT_ONCE, geometry.blocks), dtype=np.uint64)
        indices = geometry.indices(blocks)
        table = np.zeros(int(indices[-1] - indices[0]) + 1, "<u8")
        table[(indices - indices[0]).astype(np.int64)] = bat.pack_entries(
            np.full(len(blocks), BlockState.FULLY_PRESENT, np.uint64),
            np.uint64(payload) + blocks * np.uint64(geometry.block_size),
        )
        leaf.write(table, _BAT_OFFSET + int(indices[0]) * bat.ENTRY_SIZE)
