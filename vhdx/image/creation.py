# SPDX-License-Identifier: MIT
"""Creates images of any type: implements :func:`vhdx.create`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vhdx.errors import InvalidArgumentError
from vhdx.image.vhd.layout import create_vhd
from vhdx.image.vhdx.differencing import create_child
from vhdx.image.vhdx.layout import create_vhdx
from vhdx.interrupts import uninterruptible

if TYPE_CHECKING:
    from uuid import UUID

    from vhdx.interrupts import Cancel, Progress

    StrPath = str | os.PathLike[str]

__all__ = ["create_disk", "format_of_name"]

_BY_SUFFIX = {
    ".vhdx": "vhdx",
    ".avhdx": "vhdx",
    ".vhd": "vhd",
    ".avhd": "vhd",
    ".raw": "raw",
    ".img": "raw",
}


def format_of_name(path: StrPath) -> str | None:
    """The format that a file name suffix stands for: "vhdx", "vhd", "raw", or None."""
    suffix = os.path.splitext(os.fsdecode(path))[1].lower()
    return _BY_SUFFIX.get(suffix)


@uninterruptible
def create_disk(
    path: StrPath,
    size: int | None = None,
    *,
    type: str | None = None,
    parent: StrPath | None = None,
    block_size: int | None = None,
    logical_sector_size: int | None = None,
    physical_sector_size: int | None = None,
    sparse: bool = True,
    force: bool = False,
    disk_id: UUID | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Creates an empty image: a VHD if the name ends in .vhd or .avhd, else a VHDX.

    Args:
        path: of the new image; an existing file is refused unless ``force``.
        size: of the virtual disk, bytes: a multiple of the logical sector, 1 sector to 64 TiB. When
            None, a differencing image has its parent's size.
        type: "dynamic", "fixed" (all space allocated now) or "differencing". When None, an image
            with a parent is differencing, and one without a parent is dynamic.
        parent: the image that a differencing one is based on; it must not be changed afterwards.
        block_size: bytes, a power of two from 1 MiB to 256 MiB; when None 32 MiB, or 2 MiB for a
            differencing image. A VHD has 512 KiB, 1 MiB or 2 MiB, and 2 MiB when None.
        logical_sector_size, physical_sector_size: 512 or 4096; 512 and 4096 when None. A
            differencing image has its parent's. A VHD has 512 for both.
        sparse: False writes zeros over a fixed image, so that its file has no unwritten extents.
        force: replace an existing file.
        disk_id: the virtual disk id (SCSI page 83); random when None. A differencing image has its
            parent's.
        progress, cancel: called while a fixed image is allocated; if ``cancel`` returns True,
            nothing is left behind.

    Raises:
        InvalidArgumentError, ExistsError, NotFoundError, NoSpaceError, HostIOError: as the message
            says; with a parent also the exceptions of :func:`vhdx.open`.
    """
    if format_of_name(path) == "raw":
        raise InvalidArgumentError(
            "an image of this name would be taken for a raw one", path=path, hint="name it .vhdx"
        )
    given: object = size  # callers without type checks may pass anything
    if given is not None and (not isinstance(given, int) or isinstance(given, bool)):
        raise InvalidArgumentError(f"the size is {given!r}", path=path, hint="give bytes, as an int")
    if type is None:
        type = "dynamic" if parent is None else "differencing"
    if type == "differencing":
        if parent is None:
            raise InvalidArgumentError(
                "a differencing image needs a parent", path=path, hint="use --parent (parent=)"
            )
        others: list[object] = [logical_sector_size, physical_sector_size, disk_id]
        if others != [None, None, None]:
            raise InvalidArgumentError(
                "a differencing image has the sector sizes and the id of its parent", path=path
            )
        create_child(path, parent, size=size, block_size=block_size, force=force)
        return
    if parent is not None:
        raise InvalidArgumentError(
            f"a {type} image has no parent", path=path, hint='use type="differencing"'
        )
    if size is None:
        raise InvalidArgumentError("a new image needs a size", path=path, hint="use --size (size=)")
    if format_of_name(path) == "vhd":
        if logical_sector_size not in {None, 512} or physical_sector_size not in {None, 512}:
            raise InvalidArgumentError("a VHD has sectors of 512 bytes", path=path)
        create_vhd(
            path,
            size,
            type=type,
            block_size=block_size,
            sparse=sparse,
            force=force,
            disk_id=disk_id,
            progress=progress,
            cancel=cancel,
        )
        return
    create_vhdx(
        path,
        size,
        type=type,
        block_size=block_size,
        logical_sector_size=512 if logical_sector_size is None else logical_sector_size,
        physical_sector_size=4096 if physical_sector_size is None else physical_sector_size,
        sparse=sparse,
        force=force,
        disk_id=disk_id,
        progress=progress,
        cancel=cancel,
    )
