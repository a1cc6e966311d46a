# SPDX-License-Identifier: MIT
"""Finds candidates for the parent of a differencing image, and checks them ([MS-VHDX] 2.6.2.6)."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from vhdx.errors import MissingParentError, Reason
from vhdx.place import real

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vhdx.format.locator import ParentLocator
    from vhdx.image.vhdx.structure import Structure
    from vhdx.place import ImageFile

__all__ = ["candidates", "mismatch", "parent_info"]


def parent_info(structure: Structure, found: str | None) -> dict[str, Any]:
    """What ``info`` shows of the parent: path, linkage, found."""
    assert structure.parent is not None
    paths = structure.parent.paths
    return {
        "path": paths[0][1] if paths else None,
        "linkage": [str(guid) for guid in structure.parent.linkages],
        "found": found,
    }


def candidates(child: str, locator: ParentLocator, search: Sequence[str]) -> list[Path]:
    """Where the parent may be: its relative path, beside the child, in the search path.

    Args:
        child: path of the image; symbolic links are resolved.
        locator: of the image.
        search: further directories.
    """
    here = Path(real(child)).parent
    found: list[Path] = []
    for kind, value in locator.paths:
        windows = PureWindowsPath(value)
        if kind == "relative_path" and not windows.anchor:
            found.append(here.joinpath(*windows.parts))
        found += [directory / windows.name for directory in (here, *map(Path, search))]
    return list(dict.fromkeys(found))


def mismatch(
    host: ImageFile, structure: Structure, path: str, found: Structure
) -> MissingParentError | None:
    """Why ``found``, the structure of ``path``, is not the parent; None where it is."""
    assert structure.parent is not None
    if found.header.data_write_guid not in structure.parent.linkages:
        return MissingParentError(
            f"{path} was changed since this image was made from it, or is another disk",
            reason=Reason.PARENT_CHANGED,
            path=host.path,
            hint="find the parent as it was, or open this layer alone (chain=False)",
        )
    if found.parameters.logical_sector_size != structure.parameters.logical_sector_size:
        return MissingParentError(
            f"{path} has another logical sector size",
            reason=Reason.PARENT_MISMATCH,
            path=host.path,
        )
    return None
