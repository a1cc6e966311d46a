# SPDX-License-Identifier: MIT
"""Opens an image of any known format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from vhdx import lazy, plane
from vhdx.errors import InvalidArgumentError, Reason, UnsupportedError, VhdxError
from vhdx.image.disk import Disk
from vhdx.image.formats import FORMATS, RAW_SUFFIXES
from vhdx.image.host import open_file
from vhdx.image.raw import RawImage
from vhdx.image.vhd.footer import find_footer, has_footer
from vhdx.image.vhdx.image import is_vhdx, open_vhdx
from vhdx.image.vhdx.view import AS_SPECIFIED, View
from vhdx.interrupts import uninterruptible
from vhdx.place import ImageFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vhdx.image.vhd import opening as vhd_opening
else:
    vhd_opening = lazy.Module("vhdx.image.vhd.opening")

_Found = TypeVar("_Found")

__all__ = ["open_disk", "snapshot"]

_MODES = {"r": False, "r+": True}


@uninterruptible
def open_disk(
    path: str | os.PathLike[str],
    mode: str = "r",
    *,
    format: str | None = None,
    chain: bool = True,
    parent_search: Sequence[str | os.PathLike[str]] = (),
    sparse: bool = True,
    force: bool = False,
    view: View | None = None,
) -> Disk:
    """Opens a disk image.

    The signature in the file determines the format. An image is raw only by its name (.raw, .img)
    or by ``format``; its content is then not checked, because a guest can write any signature to
    its disk.

    Args:
        path: of the image.
        mode: "r", or "r+" to change it. With "r" a log that must be replayed is replayed in memory
            and the file is not changed; with "r+" it is replayed into the file.
        format: "vhdx", "vhd" or "raw"; detected when None.
        chain: open the parents of a differencing image, too; False opens this layer alone.
        parent_search: additional directories in which to search for parents.
        sparse: give the space of trimmed and zeroed blocks back to the host.
        force: allow changes to an image that has children; the children become unusable.
        view: for forensics, with "r" only: selects which header, region table and log sequence of a
            VHDX to use.

    Raises:
        NotFoundError, HostIOError, ReadOnlyError: the file cannot be opened.
        InUseError: the image is open elsewhere in a way that excludes this.
        UnsupportedError: the format is unknown.
        DamagedError, MissingParentError: the image is damaged, or a parent is missing or wrong.
    """
    if mode not in _MODES:
        raise InvalidArgumentError(f"the mode is {mode!r}", hint='use "r" or "r+"')
    if format not in {None, *FORMATS}:
        raise InvalidArgumentError(
            f"the format {format!r} is unknown", hint=f"use one of {', '.join(FORMATS)}"
        )
    write = _MODES[mode]
    if view is not None and write:
        raise InvalidArgumentError("a view allows only reading", path=path, hint='use "r"')
    if write:
        lazy.load_everything("vhdx.image")  # the disk may stay open across an upgrade
    host = open_file(path, write=write, sparse=sparse)
    raw = format == "raw" or (format is None and host.path.lower().endswith(RAW_SUFFIXES))
    pool = plane.shared_pool(plane.Level.IMAGE)
    if raw:
        return Disk(RawImage(host, write=write, pool=pool))
    search = [os.fspath(each) for each in parent_search]
    if format is None and host.path.lower().endswith((".vhd", ".avhd")):
        format = "vhd" if _looks(find_footer, host) is not None else None
    elif format is None and _looks(is_vhdx, host) and _looks(has_footer, host):
        if not host.path.lower().endswith((".vhdx", ".avhdx")):
            host.close()
            raise UnsupportedError(
                "it begins like a VHDX and ends like a VHD; a guest may have written either",
                reason=Reason.UNKNOWN_FORMAT,
                path=host.path,
                hint="specify --format (format=)",
            )
        format = "vhdx"
    if format == "vhdx" or (format is None and _looks(is_vhdx, host)):
        return Disk(
            open_vhdx(
                host,
                write=write,
                chain=chain,
                parent_search=search,
                force=force,
                pool=pool,
                view=AS_SPECIFIED if view is None else view,
            )
        )
    footer = _looks(find_footer, host)
    if footer is not None:
        return Disk(
            vhd_opening.open_vhd(
                host,
                footer,
                write=write,
                chain=chain,
                parent_search=search,
                pool=pool,
                force=force,
            )
        )
    host.close()
    raise UnsupportedError(
        "its format is unknown" if format is None else "it is not a VHD file",
        reason=Reason.UNKNOWN_FORMAT,
        path=host.path,
        hint='a raw image is opened with --format raw (format="raw")',
    )


def _looks(look: Callable[[plane.Device], _Found], host: ImageFile) -> _Found:
    try:
        return look(host.leaf)
    except BaseException as error:
        host.close()
        if isinstance(error, VhdxError):
            error.path = host.path
        raise


@uninterruptible
def snapshot(
    path: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
) -> str:
    """Keeps the content of an image and continues in a child; see :meth:`vhdx.Disk.snapshot`.

    Returns:
        The path of the checkpoint.
    """
    with open_disk(path, "r+", force=force) as disk:
        return disk.snapshot(checkpoint)
