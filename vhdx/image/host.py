# SPDX-License-Identifier: MIT
"""The host's file systems as a place: opens, locks and names files and block devices."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from vhdx import place, plane
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
from vhdx.image.attributes import OWN_PREFIX, check_owner, copy_attributes
from vhdx.image.dropped import closed_so_far, wait_for_dropped
from vhdx.image.names import rename_new, sync_directory
from vhdx.image.partial import create_partial
from vhdx.image.storage import is_read_only, kernel_node
from vhdx.place import open_file

# Whoever opens files of any place takes `open_file` from here: that makes the host's files known.
__all__ = ["HostFile", "HostPlace", "open_file"]

_NOTE = OWN_PREFIX + "children"

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

    def set_aside(self, offset: int, length: int) -> None:
        """Nothing to do: the file system finds space for writes by itself."""

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


def _key(status: os.stat_result) -> place.Key:
    """Two nodes of one block device have one key; no file has inode 0."""
    if stat.S_ISBLK(status.st_mode):
        return status.st_rdev, 0
    return status.st_dev, status.st_ino


def _exclusively(path: str) -> int:
    """The flag with which the kernel lets nobody else claim a block device; 0 for files."""
    return os.O_EXCL if Path(path).is_block_device() else 0


def _busy(path: str) -> InUseError:
    who = ""
    with contextlib.suppress(OSError):
        fd = os.open(kernel_node(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            who = lock.holders(fd)
        finally:
            os.close(fd)
    return InUseError(
        f"the block device is in use by {who}"
        if who
        else "the block device is mounted, or in use by another program or device",
        path=path,
        hint="unmount it, or choose another device",
    )


class _HostDraft:
    """A file under a temporary name (``partial.py``)."""

    def __init__(self, path: str, *, sparse: bool, bulk: bool) -> None:
        self._temporary, fd = create_partial(Path(path))
        try:
            leaf = plane.File(fd, 0, read_only=False, sparse=sparse, bulk=bulk, path=path)
        except BaseException:  # fd is closed
            self.discard()
            raise
        status = os.fstat(fd)
        self.file = HostFile(path, leaf, read_only=False, sparse=sparse, key=_key(status), fd=fd)
        self._fd = fd

    def keep_attributes(self, source: str) -> None:
        copy_attributes(source, self._fd)

    def take(self, path: str, *, replace: bool) -> None:
        if replace:
            self._temporary.replace(path)
        else:
            rename_new(self._temporary, Path(path))

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._temporary.unlink()


class _DeviceDraft:
    """A block device that is written over: it has its name, its size and its old content."""

    def __init__(self, path: str, *, sparse: bool) -> None:
        # guard() holds the lock.
        self.file = _open_once(path, write=True, sparse=sparse, locked=False)

    def keep_attributes(self, source: str) -> None:
        """A device keeps its own."""

    def take(self, path: str, *, replace: bool) -> None:
        """It has its name already."""

    def discard(self) -> None:
        """A device stays."""


class HostPlace:
    """The host's file systems; see :class:`vhdx.place.Place`."""

    def open(self, path: str, *, write: bool, sparse: bool = True, locked: bool = True) -> HostFile:
        """Opens a regular file or block device, and locks it unless ``locked`` is False.

        A snapshot or merge may give the name to another file before the lock is taken. The open is
        then repeated, so the returned file had the name while it was locked.

        Raises:
            NotFoundError, ReadOnlyError, HostIOError: the file does not exist, cannot be written, or
                is neither a regular file nor a block device.
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
                same = self.key(host.path) == host.key
            except OSError:
                same = False
            if same or not locked:
                return host
            host.close()
        raise InUseError("its name keeps moving to another file", path=path, hint="try again")

    def draft(self, path: str, *, sparse: bool = True, bulk: bool = False) -> _HostDraft:
        directory = os.path.dirname(os.path.realpath(path))
        if directory == "/dev":
            raise NotFoundError(
                "there is no such device", path=path, hint="a file in /dev would lie in memory"
            )
        return _HostDraft(path, sparse=sparse, bulk=bulk)

    def overwrite(self, path: str, *, sparse: bool = True) -> _DeviceDraft:
        return _DeviceDraft(path, sparse=sparse)

    @contextlib.contextmanager
    def guard(self, path: str) -> Iterator[None]:
        try:
            fd = os.open(kernel_node(path), os.O_RDWR | os.O_CLOEXEC | _exclusively(path))
        except PermissionError:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # the directory decides who replaces it
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _busy(path) from error
            raise
        try:
            lock.acquire(fd, path, write=True)
            yield
        finally:
            os.close(fd)

    def real(self, path: str) -> str:
        return os.path.realpath(path)

    def key(self, path: str) -> tuple[int, int]:
        return _key(os.stat(path))

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def kind(self, path: str) -> str | None:
        found = Path(path)
        return "device" if found.is_block_device() else "file" if found.is_file() else None

    def is_same_name(self, path: str, other: str) -> bool:
        if os.path.realpath(path) == os.path.realpath(other):
            return True
        try:
            if not os.path.samefile(path, other):
                return False
            if os.stat(path).st_nlink == 1:
                # The file has one name, so both paths lead to it: through a bind mount, or in a
                # case-insensitive directory.
                return True
            beside = os.path.samefile(os.path.dirname(path), os.path.dirname(other))
        except OSError:
            return False
        return beside and os.path.basename(path).casefold() == os.path.basename(other).casefold()

    def peek(self, path: str, length: int) -> bytes:
        with open(path, "rb") as file:
            return file.read(length)

    def links(self, path: str) -> int:
        return os.stat(path).st_nlink

    def names(self, directory: str) -> list[str]:
        return os.listdir(directory)

    def link(self, path: str, other: str) -> None:
        os.link(path, other)

    def rename(self, path: str, other: str) -> None:
        os.replace(path, other)

    def remove(self, path: str) -> None:
        os.unlink(path)

    def sync(self, directory: str) -> None:
        sync_directory(Path(directory))

    def check_replaceable(self, path: str) -> None:
        check_owner(path)

    def keep_attributes(self, source: str, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            copy_attributes(source, fd)
            os.fsync(fd)
        finally:
            os.close(fd)

    def note(self, path: str) -> bytes:
        try:
            return os.getxattr(path, _NOTE)
        except OSError:
            return b""  # no note, or no extended attributes

    def change_note(self, path: str, change: Callable[[bytes], bytes]) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # some file systems do not support flock
                fcntl.flock(fd, fcntl.LOCK_EX)
            os.setxattr(fd, _NOTE, change(self.note(path)))
        finally:
            os.close(fd)


def _open_once(path: str, *, write: bool, sparse: bool, locked: bool) -> HostFile:
    name = path
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        exclusively = _exclusively(name) if write and locked else 0
        fd = os.open(kernel_node(name), flags | exclusively)
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
        if error.errno == errno.EBUSY:
            raise _busy(name) from error
        if write and error.errno == errno.EROFS:
            raise ReadOnlyError("its file system is mounted read-only", path=name) from error
        raise HostIOError(error.strerror or "it cannot be opened", path=name) from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise HostIOError(f"it is {kind}", reason=Reason.NOT_A_FILE, path=name)
        is_device = stat.S_ISBLK(status.st_mode)
        if is_device and write and is_read_only(fd):
            raise ReadOnlyError(
                "the block device is read-only", path=name, hint="blockdev --setrw allows writing"
            )
        if locked:
            lock.acquire(fd, name, write=write)
        size = os.lseek(fd, 0, os.SEEK_END)  # under the lock, so the size is stable
        if is_device and size == 0:
            raise HostIOError("the block device has no medium: it has 0 bytes", path=name)
    except BaseException:
        os.close(fd)
        raise
    leaf = plane.File(fd, size, read_only=not write, sparse=sparse, path=name)
    return HostFile(
        name,
        leaf,
        read_only=not write,
        sparse=sparse,
        key=_key(status),
        fd=fd,
    )


place.register("", HostPlace())
