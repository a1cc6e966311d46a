# SPDX-License-Identifier: MIT
"""Parents of differencing images of any format: missing parents, and file name matching."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vhdx import place, plane
from vhdx.errors import MissingParentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Missing", "existing"]


class Missing:
    """Stands for a parent that was not opened: every read of it raises MissingParentError."""

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
        # Not a hole: a hole reads as zeros, but this range cannot be read.
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]


def existing(path: Path) -> Path | None:
    """The file of that name; if there is none, the only one that differs just in letter case."""
    there = place.of(path)
    try:
        if there.kind(os.fspath(path)):
            return path
        names = there.names(os.fspath(path.parent))
    except (OSError, ValueError):  # names that this place cannot have
        return None
    same = [name for name in names if name.casefold() == path.name.casefold()]
    found = path.with_name(same[0]) if len(same) == 1 else None
    return found if found is not None and there.kind(os.fspath(found)) else None
