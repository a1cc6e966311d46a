# SPDX-License-Identifier: MIT
"""Finds the VHDX images that are based on a given image.

A candidate counts as a child if its parent locator accepts the image's DataWriteGuid, and if the
locator, resolved as at open, leads to the image's file. It also counts if no parent is found,
because the image may have been moved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx.errors import InUseError, VhdxError
from vhdx.format.header import SIGNATURE
from vhdx.image.children import hinted, shown
from vhdx.image.host import open_file
from vhdx.image.parents import existing
from vhdx.image.partial import is_partial
from vhdx.image.vhdx.parents import candidates
from vhdx.image.vhdx.structure import Structure, read_structure
from vhdx.place import key_of, of, real

if TYPE_CHECKING:
    from collections.abc import Iterator

    StrPath = str | os.PathLike[str]

__all__ = ["children_of", "guard_parent", "guard_replaced"]

_MOST_NEIGHBOURS = 4096


def children_of(path: StrPath, structure: Structure) -> Iterator[Path]:
    """Images that are based on the image ``path``, whose structure is ``structure``."""
    here = Path(real(path))
    try:
        beside = sorted(of(here).names(os.fspath(here.parent)))[:_MOST_NEIGHBOURS]
    except OSError:
        beside = []
    places = [here.with_name(name) for name in beside if not is_partial(name)]
    seen = {os.fspath(here)}
    # Not devices: to read what lies beside a device in /dev could hang, or be a guest's disk.
    places = [place for place in places if of(place).kind(os.fspath(place)) == "file"]
    for place in [*places, *map(Path, hinted(here))]:
        resolved = real(place)
        if resolved in seen or not _looks_like_vhdx(place):
            continue
        seen.add(resolved)
        if _is_based_on(place, here, structure):
            yield place


def _is_based_on(place: Path, here: Path, structure: Structure) -> bool:
    found = _structure_of(place)
    guid = structure.header.data_write_guid
    if found is None or found.parent is None or guid not in found.parent.linkages:
        return False
    for candidate in candidates(str(place), found.parent, ()):
        parent = existing(candidate)
        if parent is None or key_of(parent) == key_of(place):
            continue
        if key_of(parent) == key_of(here):
            return True
        other = _structure_of(parent)
        if other is not None and other.header.data_write_guid in found.parent.linkages:
            return False  # its parent is a copy of this image elsewhere
    return True  # its parent is missing, and this image's GUID fits


def _structure_of(path: Path) -> Structure | None:
    try:
        host = open_file(path, write=False, locked=False)
    except VhdxError:
        return None
    try:
        return read_structure(host)
    except VhdxError:
        return None
    finally:
        host.close()


def _looks_like_vhdx(path: Path) -> bool:
    try:
        there, name = of(path), os.fspath(path)
        return there.kind(name) is not None and there.peek(name, len(SIGNATURE)) == SIGNATURE
    except (OSError, ValueError):
        return False


def guard_parent(path: StrPath, structure: Structure) -> None:
    """Refuses to change an image that another one depends on.

    Raises:
        InUseError: there is a child; the message names it.
    """
    child = next(children_of(path, structure), None)
    if child is not None:
        raise InUseError(
            f"{shown(child, path)} depends on it: a change would make that image unusable",
            path=path,
            hint="change the child instead, or merge it; resize and snapshot have --force "
            "(force=True)",
        )


def guard_replaced(path: StrPath) -> None:
    """Refuses to replace a VHDX image that another one depends on; ignores other files.

    Raises:
        InUseError: there is a child; the message names it.
    """
    structure = _structure_of(Path(path)) if _looks_like_vhdx(Path(path)) else None
    child = None if structure is None else next(children_of(path, structure), None)
    if child is not None:
        raise InUseError(
            f"{shown(child, path)} depends on it: without it, that image is unusable",
            path=path,
            hint="merge or remove the child first, or choose another name",
        )
