# SPDX-License-Identifier: MIT
"""Differencing images: how a child names its parent, and creating one."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from vhdx.errors import InvalidArgumentError
from vhdx.format import locator, metadata
from vhdx.format.header import NIL
from vhdx.image.children import note_child
from vhdx.image.host import open_file
from vhdx.image.parents import existing
from vhdx.image.replacing import new_file
from vhdx.image.vhdx import layout
from vhdx.image.vhdx.parents import candidates
from vhdx.image.vhdx.structure import Structure, read_structure
from vhdx.place import key_of, real

if TYPE_CHECKING:
    from uuid import UUID

    from vhdx.image.vhdx.layout import StrPath

__all__ = ["DEFAULT_CHILD_BLOCK_SIZE", "create_child", "inherited_items", "locator_for"]

DEFAULT_CHILD_BLOCK_SIZE = 2 << 20
_LONGEST_CHAIN = 256


def relative_windows_path(parent: StrPath, child: StrPath) -> str:
    r"""The parent's path seen from the child's directory, as Windows writes it (``.\\a.vhdx``)."""
    here = Path(real(child)).parent
    relative = Path(os.path.relpath(real(parent), here))
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

    Raises:
        InvalidArgumentError: the written locator would not lead back to the parent.
    """
    entries = {
        "parent_linkage": f"{{{linkage}}}",
        "relative_path": relative_windows_path(parent, child),
        "parent_linkage2": f"{{{NIL}}}",
    }
    if windows_path is not None:
        entries["absolute_win32_path"] = windows_path
    made = locator.ParentLocator(entries)
    try:
        again = locator.parse_locator(locator.pack_locator(made), 0)
    except UnicodeEncodeError:
        again = None
    places = [] if again is None else candidates(os.fspath(child), again, ())
    # Readers parse the path as a Windows path, where backslash and colon have a special meaning.
    if not places or real(places[0]) != real(parent):
        raise InvalidArgumentError(
            "this parent's name cannot be written into an image",
            path=parent,
            hint="rename it, or its directory",
        )
    return made


def inherited_items(structure: Structure) -> list[tuple[metadata.Item, bytes]]:
    """Metadata items of the virtual disk that a child gets from its parent ([MS-VHDX] 2.6.1.2).

    Items that every image has are left out: they are written from the disk's parameters.
    """
    base, overlay = structure.metadata_region.offset, structure.overlay
    return [
        (item, overlay.read(base + item.offset, item.length))
        for item in structure.items
        if item.is_virtual_disk and (item.is_user or item.guid not in metadata.WRITTEN)
    ]


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
        path: of the new image; an existing file is refused unless ``force`` is set.
        parent: a VHDX image that is not open for writing.
        size: bytes, at least the parent's; the parent's when None.
        block_size: bytes, 2 MiB when None; it may differ from the parent's.
        force: replace an existing file.
        windows_path: the parent's absolute path on a Windows host.
    """
    host = open_file(parent, write=False)
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
        if key_of(path) is not None:
            _check_not_in_chain(path, parent, structure)
        link = locator_for(parent, path, structure.header.data_write_guid, windows_path)
        items = inherited_items(structure)
        with new_file(path, force=force) as leaf:
            note_child(parent, path)  # before the child exists: a stale hint is harmless
            layout.write_image(leaf, child, sparse=True, parent=link, items=items)
    finally:
        host.close()


def _check_not_in_chain(path: StrPath, parent: StrPath, structure: Structure) -> None:
    """Refuses to replace the parent, or an image that the parent is based on."""
    layer, below, depth = os.fspath(parent), structure, 0
    while layer is not None:
        if key_of(path) == key_of(layer):
            raise InvalidArgumentError("it would be its own parent", path=path)
        depth += 1
        if below.parent is None or depth > _LONGEST_CHAIN:
            return
        found = [existing(place) for place in candidates(layer, below.parent, ())]
        here = next((str(place) for place in found if place is not None), None)
        if here is None:
            return
        host = open_file(here, write=False, locked=False)
        try:
            layer, below = here, read_structure(host)
        finally:
            host.close()
