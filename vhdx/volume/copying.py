# SPDX-License-Identifier: MIT
"""Copies files as they are between places: into a volume, out of it, or within it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from vhdx import place, plane
from vhdx.errors import ExistsError, NotFoundError, Reason, VhdxError
from vhdx.interrupts import uninterruptible
from vhdx.units import MIB

if TYPE_CHECKING:
    from vhdx.interrupts import Cancel, Progress

__all__ = ["copy_file"]

_PIECE = 8 * MIB


@uninterruptible
def copy_file(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> int:
    """Copies a file as it is; holes stay holes.

    The destination gets its name when it is complete and durable; else nothing is left behind.

    Args:
        source: a path of any place.
        destination: likewise.
        force: replace an existing file.
        progress, cancel: bytes done and in all; True stops.

    Returns:
        The size in bytes.

    Raises:
        ExistsError, NotFoundError, NoSpaceError, HostIOError: as the message says.
    """
    there, name = place.of(destination), place.spelled(destination)
    if not force and there.exists(name):
        raise ExistsError(
            "it exists already", path=name, hint="remove it, or use --force (force=True)"
        )
    file = place.open_file(source, write=False)
    try:
        try:
            draft = there.draft(name, bulk=True)
        except FileNotFoundError as error:
            raise NotFoundError("there is no such directory", path=name) from error
        try:
            _copy(file.leaf, draft.file.leaf, progress, cancel)
            try:
                with there.guard(name) if force and there.exists(name) else contextlib.nullcontext():
                    draft.take(name, replace=force)
            except FileExistsError as error:
                raise ExistsError("it exists already", path=name) from error
            there.sync(os.path.dirname(name) or ".")
        finally:
            draft.discard()
            draft.file.close()
        return file.leaf.size
    finally:
        file.close()


def _copy(
    source: plane.Device, target: plane.Device, progress: Progress | None, cancel: Cancel | None
) -> None:
    size = source.size
    target.resize(size)
    buffer = memoryview(bytearray(_PIECE))
    for extent in source.extents(0, size):
        if extent.state != plane.DATA:
            continue
        for at in range(extent.offset, extent.offset + extent.length, _PIECE):
            if cancel is not None and cancel():
                raise VhdxError(
                    "the copy was stopped; nothing was left behind", reason=Reason.CANCELLED
                )
            part = buffer[: min(_PIECE, extent.offset + extent.length - at)]
            source.read_into(part, at)
            target.write(part, at)
            if progress is not None:
                progress(at + len(part), size)
    target.flush()
    if progress is not None:
        progress(size, size)
