# SPDX-License-Identifier: MIT
"""Opens, checks and locks the host file of an image, and makes it a leaf of the plane."""

from __future__ import annotations

import os
import stat

from vhdx import plane
from vhdx.errors import (
    ClosedError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    ReadOnlyError,
    Reason,
)
from vhdx.image import lock
from vhdx.image.dropped import closed_so_far, wait_for_dropped

__all__ = ["HostFile", "open_host"]

_MOST_TRIES = 20


class HostFile:
    """An open host file and its leaf.

    Attributes:
        path: as the caller gave it.
        leaf: the device that reads and writes the file.
        read_only: whether changes are refused.
        sparse: whether released space is given back to the host.
        key: (device, inode), which are equal if two paths lead to the same file.
        keep: leave the leaf open in :meth:`close`, because the caller owns it.
        fd: the leaf's descriptor, for locks and fstat.
    """

    def __init__(
        self,
        path: str,
        leaf: plane.Device,
        *,
        read_only: bool,
        sparse: bool,
        key: tuple[int, int],
        keep: bool = False,
        fd: int | None = None,
    ) -> None:
        self.path = path
        self.leaf = leaf
        self.read_only = read_only
        self.sparse = sparse
        self.key = key
        self._keep = keep
        self._fd = fd

    def close(self) -> None:
        """Closes the file, which releases its locks; the leaf must not be used afterwards."""
        if isinstance(self.leaf, plane.File) and not self._keep:
            self.leaf.close()

    def freeze(self, path: str) -> None:
        """Makes the file, now named ``path``, read-only and downgrades its lock."""
        self.path, self.leaf.path, self.read_only = path, path, True
        if self._fd is not None:
            lock.downgrade(self._fd)

    def allocated(self) -> int:
        """Bytes that the host has allocated to the file."""
        if self._fd is None:
            return 0
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError as error:
            raise ClosedError("the disk was closed", path=self.path) from error


def open_host(
    path: str | os.PathLike[str], *, write: bool, sparse: bool = True, locked: bool = True
) -> HostFile:
    """Opens a regular file or block device, and locks it unless ``locked`` is False.

    A snapshot or merge may give the name to another file before the lock is taken. The open is then
    repeated, so the returned file had the name while it was locked.

    Raises:
        NotFoundError, ReadOnlyError, HostIOError: the file does not exist, cannot be written, or is
            neither a regular file nor a block device.
        InUseError: the image is open elsewhere in a way that excludes this.
    """
    for _ in range(_MOST_TRIES):
        closed = closed_so_far()
        try:
            host = _open_once(path, write=write, sparse=sparse, locked=locked)
        except InUseError:
            if wait_for_dropped() == closed:
                raise  # no dropped Disk was closed, so another opener holds the lock
            host = _open_once(path, write=write, sparse=sparse, locked=locked)
        try:
            status = os.stat(host.path)
            same = (status.st_dev, status.st_ino) == host.key
        except OSError:
            same = False
        if same or not locked:
            return host
        host.close()
    raise InUseError("its name keeps moving to another file", path=path, hint="try again")


def _open_once(path: str | os.PathLike[str], *, write: bool, sparse: bool, locked: bool) -> HostFile:
    name = os.fsdecode(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        fd = os.open(name, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFoundError("there is no such file", path=name) from error
    except ValueError as error:
        raise InvalidArgumentError("no file can have this name", path=name) from error
    except IsADirectoryError as error:
        raise HostIOError("it is a directory", reason=Reason.NOT_A_FILE, path=name) from error
    except PermissionError as error:
        if write and os.access(name, os.R_OK):
            raise ReadOnlyError("the file may not be written", path=name) from error
        raise HostIOError(
            "permission denied", reason=Reason.PERMISSION, path=name, hint="check its owner"
        ) from error
    except OSError as error:
        if write and error.errno == 30:  # EROFS
            raise ReadOnlyError("its file system is mounted read-only", path=name) from error
        raise HostIOError(error.strerror or "it cannot be opened", path=name) from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise HostIOError(f"it is {kind}", reason=Reason.NOT_A_FILE, path=name)
        if locked:
            lock.acquire(fd, name, write=write)
        size = os.lseek(fd, 0, os.SEEK_END)  # under the lock, so the size is stable
    except BaseException:
        os.close(fd)
        raise
    leaf = plane.File(fd, size, read_only=not write, sparse=sparse, path=name)
    return HostFile(
        name,
        leaf,
        read_only=not write,
        sparse=sparse,
        key=(status.st_dev, status.st_ino),
        fd=fd,
    )
