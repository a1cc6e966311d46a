# SPDX-License-Identifier: MIT
"""New files that take their name when complete, with the attributes of the file they replace."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    Reason,
    VhdxError,
)
from vhdx.image import lock
from vhdx.image.attributes import check_owner, copy_attributes
from vhdx.image.children import guard_replaced
from vhdx.image.partial import create_partial

if TYPE_CHECKING:
    from collections.abc import Iterator

    StrPath = str | os.PathLike[str]

__all__ = ["new_file", "rename_new", "sync_directory"]


@contextlib.contextmanager
def new_file(path: StrPath, *, force: bool, sparse: bool = True) -> Iterator[plane.Device]:
    """A leaf over a new file that gets the name ``path`` when the block ends without an exception.

    The content and the name are durable afterwards. After an exception nothing is left behind. With
    ``force`` an existing file is replaced; if ``path`` is a symbolic link, its target is replaced.

    Raises:
        ExistsError: ``path`` exists already and ``force`` is not set.
        InUseError: the existing file is open, or another image is based on it.
        NotFoundError, NoSpaceError, HostIOError: the file cannot be made.
    """
    guard: int | None = None
    try:
        _refuse_deleted(path)
        target = Path(os.path.realpath(path)) if force else Path(path)
        guard = _guard_target(target, force=force)
        temporary, fd = create_partial(target)
    except BaseException as error:
        if guard is not None:
            os.close(guard)
        if isinstance(error, VhdxError):
            raise
        if isinstance(error, FileNotFoundError):
            raise NotFoundError("there is no such directory", path=path) from error
        if isinstance(error, ValueError):
            raise InvalidArgumentError("no file can have this name", path=path) from error
        if isinstance(error, OSError):
            raise _host_error(error, path) from error
        raise
    try:
        leaf = plane.File(fd, 0, read_only=False, sparse=sparse, bulk=True, path=os.fspath(path))
    except BaseException:
        os.close(fd)
        temporary.unlink()
        if guard is not None:
            os.close(guard)
        raise
    try:
        if guard is not None:
            copy_attributes(target, fd)
        yield leaf
        leaf.flush()
        try:
            if force:
                temporary.replace(target)
            else:
                rename_new(temporary, target)
            sync_directory(target.parent)
        except FileExistsError as error:
            raise _exists(path) from error
        except OSError as error:
            raise error if isinstance(error, VhdxError) else _host_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        leaf.close()
        if guard is not None:
            os.close(guard)


def _refuse_deleted(path: StrPath) -> None:
    """Refuses a deleted file, which a path such as /proc/self/fd/N can still lead to."""
    try:
        links = os.stat(path).st_nlink
    except (OSError, ValueError):
        return  # no such file exists, or the name is impossible
    if links == 0:
        raise InvalidArgumentError(
            "the file was deleted, so there is no name that a new one could take", path=path
        )


def _guard_target(target: Path, *, force: bool) -> int | None:
    """Locks the file to be replaced, so that no open image is lost; returns its descriptor."""
    if not os.path.lexists(target):
        return None
    if not force:
        raise _exists(target)
    if target.exists() and not target.is_file():
        raise HostIOError("it is not a regular file", reason=Reason.NOT_A_FILE, path=target)
    check_owner(target)
    try:
        fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)  # the directory decides who replaces it
    try:
        try:
            lock.acquire(fd, os.fspath(target), write=True)
        except InUseError:
            guard_replaced(target)  # if a child has it open, name the child
            raise
        guard_replaced(target)
    except BaseException:
        os.close(fd)
        raise
    return fd


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


def _exists(path: StrPath) -> ExistsError:
    return ExistsError("it exists already", path=path, hint="remove it, or use --force (force=True)")


def _host_error(error: OSError, path: StrPath) -> HostIOError | NoSpaceError:
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
        raise _host_error(error, path) from error
