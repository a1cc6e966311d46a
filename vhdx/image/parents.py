# SPDX-License-Identifier: MIT
"""Where the parent of a differencing image may be, and whether a file is it ([MS-VHDX] 2.6.2.6)."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.errors import MissingParentError, Reason, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vhdx.format.locator import ParentLocator
    from vhdx.image.host import HostFile
    from vhdx.image.structure import Structure

__all__ = ["Missing", "candidates", "existing", "mismatch", "parent_info"]


class Missing:
    """Stands for a parent that was not opened: every read of it says so."""

    def __init__(self, path: str, why: MissingParentError) -> None:
        self._path = path
        self._why = why

    def _refuse(self, offset: int) -> MissingParentError:
        return MissingParentError(
            f"the sector at {offset:#x} of the disk is not in this layer: {self._why.message}",
            path=self._path,
            hint=self._why.hint,
        )

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        raise self._refuse(offset)

    def pwrite(self, data: memoryview, offset: int) -> None:
        raise self._refuse(offset)

    def zero(self, offset: int, length: int) -> None:
        raise self._refuse(offset)

    def trim(self, offset: int, length: int) -> None:
        raise self._refuse(offset)

    def flush(self) -> None:
        """Nothing to make durable."""

    def resize(self, size: int) -> None:
        raise UnsupportedError("a missing parent has no size", path=self._path)

    def extents(self, offset: int, length: int) -> Iterable[plane.device.RawExtent]:
        # Not a hole: it does not read as zeros, it does not read at all.
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]


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
        child: path of the image; where a symbolic link leads counts.
        locator: of the image.
        search: further directories.
    """
    here = Path(os.path.realpath(child)).parent
    found: list[Path] = []
    for kind, value in locator.paths:
        windows = PureWindowsPath(value)
        if kind == "relative_path" and not windows.anchor:
            found.append(here.joinpath(*windows.parts))
        found += [directory / windows.name for directory in (here, *map(Path, search))]
    return list(dict.fromkeys(found))


def existing(path: Path) -> Path | None:
    """The file of that name; letters of either case will do, as on Windows."""
    try:
        if path.is_file():
            return path
        names = os.listdir(path.parent)
    except (OSError, ValueError):  # names that this host cannot have
        return None
    same = [name for name in names if name.casefold() == path.name.casefold()]
    found = path.with_name(same[0]) if len(same) == 1 else None
    return found if found is not None and found.is_file() else None


def mismatch(
    host: HostFile, structure: Structure, path: str, found: Structure
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
