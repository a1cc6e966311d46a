# SPDX-License-Identifier: MIT
"""Differencing images: creating a child, and finding the children of a parent."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from vhdx.errors import InUseError, InvalidArgumentError, VhdxError
from vhdx.format import locator
from vhdx.format.header import NIL
from vhdx.image import layout
from vhdx.image.host import open_host
from vhdx.image.structure import Structure, read_structure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from vhdx.image.layout import StrPath

__all__ = ["DEFAULT_CHILD_BLOCK_SIZE", "children_near", "create_child", "guard_parent", "locator_for"]

DEFAULT_CHILD_BLOCK_SIZE = 2 << 20
_SUFFIXES = (".vhdx", ".avhdx")
_MOST_NEIGHBOURS = 4096


def relative_windows_path(parent: StrPath, child: StrPath) -> str:
    r"""The parent's path seen from the child's directory, as Windows writes it (``.\\a.vhdx``)."""
    here = Path(os.path.realpath(child)).parent
    relative = Path(os.path.relpath(os.path.realpath(parent), here))
    text = str(PureWindowsPath(*relative.parts))
    return text if text.startswith("..") else f".\\{text}"


def locator_for(
    parent: StrPath, child: StrPath, linkage: UUID, windows_path: str | None = None
) -> locator.ParentLocator:
    """The locator with which ``child`` names ``parent`` ([MS-VHDX] 2.6.2.6).

    Args:
        parent, child: paths on this host.
        linkage: the parent's DataWriteGuid.
        windows_path: the parent's absolute path on a Windows host, if the caller knows one.
    """
    entries = {
        "parent_linkage": f"{{{linkage}}}",
        "relative_path": relative_windows_path(parent, child),
        "parent_linkage2": f"{{{NIL}}}",
    }
    if windows_path is not None:
        entries["absolute_win32_path"] = windows_path
    return locator.ParentLocator(entries)


def create_child(
    path: StrPath,
    parent: StrPath,
    *,
    size: int | None = None,
    block_size: int | None = None,
    force: bool = False,
    windows_path: str | None = None,
) -> None:
    """Creates an empty differencing image; it inherits size, sector sizes and virtual disk id.

    Args:
        path: where; an existing file is refused unless ``force``.
        parent: a VHDX image that nobody has open for writing.
        size: bytes; at least the parent's, which it is when None.
        block_size: bytes, 2 MiB when None; the parent's may be another.
        force: replace what is there.
        windows_path: the parent's absolute path on a Windows host.
    """
    host = open_host(parent, write=False)
    try:
        structure = read_structure(host)
        parameters = structure.parameters
        if size is not None and size < parameters.virtual_size:
            raise InvalidArgumentError(
                f"the size of {size} bytes is less than the parent's {parameters.virtual_size}",
                path=path,
                hint="leave the size out",
            )
        child = layout.check_parameters(
            path,
            parameters.virtual_size if size is None else size,
            type="differencing",
            block_size=DEFAULT_CHILD_BLOCK_SIZE if block_size is None else block_size,
            logical_sector_size=parameters.logical_sector_size,
            physical_sector_size=parameters.physical_sector_size,
            disk_id=parameters.disk_id,
        )
        if os.path.exists(path) and os.path.samefile(path, parent):
            raise InvalidArgumentError("it would be its own parent", path=path)
        link = locator_for(parent, path, structure.header.data_write_guid, windows_path)
        with layout.new_file(path, force=force) as leaf:
            layout.write_image(leaf, child, sparse=True, parent=link)
    finally:
        host.close()


def children_near(path: StrPath, structure: Structure) -> Iterator[Path]:
    """Images in the same directory that name ``path`` as their parent and still fit it."""
    here = Path(os.path.realpath(path))
    try:
        names = sorted(n for n in os.listdir(here.parent) if n.lower().endswith(_SUFFIXES))
    except OSError:
        return
    for name in names[:_MOST_NEIGHBOURS]:
        other = here.with_name(name)
        if name == here.name or not other.is_file():
            continue
        try:
            host = open_host(other, write=False, locked=False)
        except VhdxError:
            continue
        try:
            found = read_structure(host).parent
        except VhdxError:
            continue
        finally:
            host.close()
        if found is None or structure.header.data_write_guid not in found.linkages:
            continue
        if any(PureWindowsPath(p).name.casefold() == here.name.casefold() for _, p in found.paths):
            yield other


def guard_parent(path: StrPath, structure: Structure) -> None:
    """Refuses to change an image that a child beside it depends on.

    Raises:
        InUseError: naming the child.
    """
    child = next(children_near(path, structure), None)
    if child is not None:
        raise InUseError(
            f"{child.name} depends on it as it is: a change would destroy that image",
            path=path,
            hint="change the child instead, merge it, or use --force (force=True)",
        )
