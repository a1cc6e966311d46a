# SPDX-License-Identifier: MIT
"""Differencing images: creating a child, and finding the children of a parent."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from vhdx.errors import InUseError, InvalidArgumentError, VhdxError
from vhdx.format import locator
from vhdx.format.header import NIL, SIGNATURE
from vhdx.image import layout
from vhdx.image.host import open_host
from vhdx.image.parents import candidates, existing
from vhdx.image.structure import Structure, read_structure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from vhdx.image.layout import StrPath

__all__ = ["DEFAULT_CHILD_BLOCK_SIZE", "children_near", "create_child", "guard_parent", "locator_for"]

DEFAULT_CHILD_BLOCK_SIZE = 2 << 20
_MOST_NEIGHBOURS = 4096
_LONGEST_CHAIN = 256


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
    relative = relative_windows_path(parent, child)
    try:
        relative.encode("utf-16-le")
    except UnicodeEncodeError:
        relative = ""
    if not relative or "\\" in Path(os.path.realpath(parent)).name:
        raise InvalidArgumentError(
            "a parent of this name cannot be written into an image", path=parent, hint="rename it"
        )
    entries = {
        "parent_linkage": f"{{{linkage}}}",
        "relative_path": relative,
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
        if os.path.exists(path):
            _check_not_in_chain(path, parent, structure)
        link = locator_for(parent, path, structure.header.data_write_guid, windows_path)
        with layout.new_file(path, force=force) as leaf:
            layout.write_image(leaf, child, sparse=True, parent=link)
    finally:
        host.close()


def _check_not_in_chain(path: StrPath, parent: StrPath, structure: Structure) -> None:
    """Refuses to replace the parent, or what the parent is based on."""
    layer, below, depth = os.fspath(parent), structure, 0
    while layer is not None:
        if os.path.samefile(path, layer):
            raise InvalidArgumentError("it would be its own parent", path=path)
        depth += 1
        if below.parent is None or depth > _LONGEST_CHAIN:
            return
        found = [existing(place) for place in candidates(layer, below.parent, ())]
        here = next((str(place) for place in found if place is not None), None)
        if here is None:
            return
        host = open_host(here, write=False, locked=False)
        try:
            layer, below = here, read_structure(host)
        finally:
            host.close()


def children_near(path: StrPath, structure: Structure) -> Iterator[Path]:
    """Images in the same directory that name ``path`` as their parent and still fit it."""
    here = Path(os.path.realpath(path))
    try:
        names = sorted(os.listdir(here.parent))
    except OSError:
        return
    for name in names[:_MOST_NEIGHBOURS]:
        other = here.with_name(name)
        if name == here.name or not _looks_like_vhdx(other):
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
        named = any(
            PureWindowsPath(p).name.casefold() == here.name.casefold() for _, p in found.paths
        )
        places = (existing(place) for place in candidates(str(other), found, ()))
        if named or any(p is not None and os.path.samefile(p, here) for p in places):
            yield other


def _looks_like_vhdx(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except OSError:
        return False


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
            hint="change the child instead, or merge it; force=True (--force of resize and snapshot) "
            "changes it all the same",
        )
