# SPDX-License-Identifier: MIT
"""Creates legacy VHD files: fixed ones, which Azure accepts, and dynamic ones."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from vhdx.errors import InvalidArgumentError, UnsupportedError
from vhdx.format import vhd
from vhdx.image.replacing import new_file
from vhdx.image.reserving import reserve
from vhdx.units import GIB, KIB, MIB, round_up

if TYPE_CHECKING:
    import os

    from vhdx import plane
    from vhdx.interrupts import Cancel, Progress

    StrPath = str | os.PathLike[str]

__all__ = ["check_vhd", "create_vhd", "write_vhd"]

_TYPES = {"fixed": vhd.DiskType.FIXED, "dynamic": vhd.DiskType.DYNAMIC}
_SMALLEST_BLOCK, _LARGEST_BLOCK = 512 * KIB, 2 * MIB
_HEADER_OFFSET = vhd.FOOTER_SIZE
_TABLE_OFFSET = _HEADER_OFFSET + vhd.HEADER_SIZE
_TABLE_PIECE = MIB


def check_vhd(path: StrPath, size: int, *, type: str, block_size: int | None) -> int:
    """Checks the parameters of a new image and returns its block size.

    Raises:
        InvalidArgumentError: a VHD cannot have these parameters.
    """

    def refuse(message: str, hint: str) -> InvalidArgumentError:
        return InvalidArgumentError(message, path=path, hint=hint)

    if type not in _TYPES:
        raise refuse(f"a VHD image of type {type!r} is not made here", "choose dynamic or fixed")
    if size <= 0 or size > vhd.LARGEST_DISK:
        raise refuse(
            f"the size is {size} bytes",
            f"a VHD has 1 sector to {vhd.LARGEST_DISK // GIB} GiB; VHDX has up to 64 TiB",
        )
    if size % vhd.SECTOR:
        raise refuse(
            f"the size of {size} bytes is no multiple of the sector of 512 bytes",
            f"choose {round_up(size, vhd.SECTOR)}",
        )
    block = vhd.DEFAULT_BLOCK_SIZE if block_size is None else block_size
    if not _SMALLEST_BLOCK <= block <= _LARGEST_BLOCK or block & (block - 1):
        raise refuse(f"the block size is {block}", "a VHD has blocks of 512K, 1M or 2M")
    return block


def create_vhd(
    path: StrPath,
    size: int,
    *,
    type: str = "dynamic",
    block_size: int | None = None,
    sparse: bool = True,
    force: bool = False,
    disk_id: UUID | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Creates an empty image; see :func:`vhdx.create`."""
    block = check_vhd(path, size, type=type, block_size=block_size)
    with new_file(path, force=force, sparse=sparse) as leaf:
        write_vhd(
            leaf,
            size,
            type=type,
            block_size=block,
            sparse=sparse,
            disk_id=disk_id,
            progress=progress,
            cancel=cancel,
        )


def write_vhd(
    leaf: plane.Device,
    size: int,
    *,
    type: str,
    block_size: int,
    sparse: bool,
    allocate: bool = True,
    disk_id: UUID | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Writes an empty image to an empty leaf.

    Args:
        leaf: the file.
        size: of the disk, bytes.
        type: "fixed" or "dynamic".
        block_size: of a dynamic image, bytes.
        sparse: False writes zeros over a fixed image.
        allocate: allocate the space of a fixed image.
        disk_id: random when None.
        progress, cancel: called while a fixed image is allocated.

    Raises:
        UnsupportedError: the leaf is a block device.
    """
    if leaf.size > 0:
        raise UnsupportedError(
            "a VHD ends with its footer, and a block device does not end there",
            path=leaf.path,
            hint="write a raw disk or a VHDX to the device, or the VHD to a file",
        )
    footer = vhd.new_footer(size, _TYPES[type], uuid4() if disk_id is None else disk_id).pack()
    if type == "fixed":
        leaf.resize(size + vhd.FOOTER_SIZE)
        if allocate or not sparse:
            reserve(leaf, 0, size, sparse=sparse, progress=progress, cancel=cancel)
        leaf.write(footer, size)
        leaf.flush()
        return
    entries = -(-size // block_size)
    length = round_up(4 * entries, vhd.SECTOR)
    leaf.resize(_TABLE_OFFSET + length + vhd.FOOTER_SIZE)
    for at in range(0, length, _TABLE_PIECE):
        leaf.write(b"\xff" * min(_TABLE_PIECE, length - at), _TABLE_OFFSET + at)
    leaf.write(vhd.DynamicHeader(_TABLE_OFFSET, entries, block_size).pack(), _HEADER_OFFSET)
    leaf.write(footer, 0)
    leaf.write(footer, _TABLE_OFFSET + length)
    leaf.flush()
