# SPDX-License-Identifier: MIT
"""Host files that hold images: opened, checked, locked, and turned into a leaf of the plane."""

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

_LARGEST_FILE = (1 << 63) - 1
_MOST_TRIES = 20


class HostFile:
    """An open host file and its leaf.

    Attributes:
        path: as the caller gave it.
        leaf: the device that reaches its bytes.
        read_only: whether it was opened for reading.
        sparse: whether released space is given back to the host.
        key: (device, inode), which tell whether two paths are the same file.
        keep: leave the leaf open in :meth:`close`, because it is the caller's.
        fd: the leaf's descriptor, to ask the host about the file.
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
        """Closes the file and so lets go of its locks; nothing may use the leaf any more."""
        if isinstance(self.leaf, plane.File) and not self._keep:
            self.leaf.close()

    def freeze(self, path: str) -> None:
        """The file, now called ``path``, is only read from here on; its lock says so."""
        self.path, self.leaf.path, self.read_only = path, path, True
        if self._fd is not None:
            lock.downgrade(self._fd)

    def allocated(self) -> int:
        """Bytes that the host has set aside for the file."""
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

    The file is the one that has the name once it is locked: a snapshot or merge may give the name to
    another file in between, and then that one is opened.

    Raises:
        NotFoundError, ReadOnlyError, HostIOError: it is not there, not writable, or no such file.
        InUseError: somebody else has it open in a way that excludes this.
    """
    for _ in range(_MOST_TRIES):
        closed = closed_so_far()
        try:
            host = _open_once(path, write=write, sparse=sparse, locked=locked)
        except InUseError:
            if wait_for_dropped() == closed:
                raise  # the lock belongs to somebody else, not to a dropped Disk of this process
            host = _open_once(path, write=write, sparse=sparse, locked=locked)
        try:
            status = os.stat(host.path)
            same = (status.st_dev, status.st_ino) == host.key
        except OSError:
            same = False
        if same or not locked:
            return host
        host.close()
    raise InUseError("its name goes from file to file", path=path, hint="try again")


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
        size = os.lseek(fd, 0, os.SEEK_END)  # now nobody else changes it
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
