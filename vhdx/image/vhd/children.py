# SPDX-License-Identifier: MIT
"""Finds the children of a VHD image in its directory; a child records its parent's unique ID."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx.errors import DamagedError, InUseError, UnsupportedError, VhdxError
from vhdx.format import vhd
from vhdx.image.host import open_file
from vhdx.image.vhd.footer import find_footer, known_footer
from vhdx.place import ImageFile, of, real

if TYPE_CHECKING:
    StrPath = str | os.PathLike[str]

__all__ = ["guard_parent", "guard_replaced"]


def guard_parent(host: ImageFile, footer: vhd.Footer) -> None:
    """Refuses to change an image that has a differencing child in its directory.

    Raises:
        InUseError: naming the child.
    """
    here = Path(real(host.path)).parent
    there = of(host.path)
    for name in sorted(there.names(os.fspath(here))):
        path = here / name
        if path.suffix.lower() not in {".vhd", ".avhd"} or there.kind(os.fspath(path)) is None:
            continue
        try:
            other = open_file(path, write=False, locked=False)
        except VhdxError:
            continue
        try:
            found = known_footer(other.leaf)
            if found is None or found.disk_type != vhd.DiskType.DIFFERENCING:
                continue
            at = found.data_offset
            if at > other.leaf.size - vhd.HEADER_SIZE:
                continue
            header = vhd.parse_header(other.leaf.read(vhd.HEADER_SIZE, at), at, found)
            if header.parent_id == footer.unique_id:
                raise InUseError(
                    f"{path} is based on it, and would be lost if it changed",
                    path=host.path,
                    hint="use --force (force=True) if that is what you want",
                )
        except DamagedError:
            continue
        finally:
            other.close()


def guard_replaced(path: StrPath) -> None:
    """Refuses to replace a VHD that another one depends on; ignores files of other formats.

    Raises:
        InUseError: naming the child.
    """
    try:
        host = open_file(path, write=False, locked=False)
    except VhdxError:
        return
    try:
        with contextlib.suppress(UnsupportedError):  # an unknown kind of VHD has no known children
            footer = find_footer(host.leaf)
            if footer is not None:
                guard_parent(host, footer)
    finally:
        host.close()
