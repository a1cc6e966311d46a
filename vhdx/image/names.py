# SPDX-License-Identifier: MIT
"""Names of host files: taken without replacing anything, and made durable."""

from __future__ import annotations

import os
from pathlib import Path

from vhdx.errors import HostIOError, NoSpaceError, Reason

__all__ = ["host_error", "rename_new", "sync_directory"]

StrPath = str | os.PathLike[str]


def rename_new(temporary: Path, target: Path) -> None:
    """Gives a file the name ``target``, which must be free; the temporary name may remain.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: a file that gets this name after the check is replaced.
        # An incomplete file never has the name.
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        temporary.rename(target)


def host_error(error: OSError, path: StrPath) -> HostIOError | NoSpaceError:
    """The exception for a failure that the host reported on ``path``."""
    if error.errno == NoSpaceError.error_number:
        return NoSpaceError("no space left on the host", path=path)
    reason = Reason.PERMISSION if isinstance(error, PermissionError) else Reason.IO
    return HostIOError((error.strerror or str(error)).lower(), reason=reason, path=path)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable.

    Raises:
        HostIOError: the sync failed, so it is unknown which names are durable.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise host_error(error, path) from error
