# SPDX-License-Identifier: MIT
"""Image locks that QEMU understands.

QEMU's file driver takes open-file-description locks on single bytes. Byte ``100 + p`` means "I use
permission p", byte ``200 + p`` means "I do not share permission p". All are read locks, so they
never exclude each other. Each side then checks whether anyone else has locked a conflicting byte.
vhdx does the same, so conflicting opens by vhdx, qemu-img, qemu-nbd and QEMU exclude each other
(block/file-posix.c, include/block/block-common.h).

A reader uses CONSISTENT_READ and does not share WRITE and RESIZE. A writer also uses WRITE and
RESIZE. The locks belong to the open file description, so the kernel releases them when that is
closed, also after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from vhdx.errors import HostIOError, InUseError

__all__ = ["acquire", "downgrade", "holders"]

_USED, _UNSHARED = 100, 200
_CONSISTENT_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE = 0, 1, 2, 3
_FLOCK = struct.Struct("@hhqqi4x")


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _taken(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def acquire(fd: int, path: str, *, write: bool) -> bool:
    """Locks the open file for reading, or for writing.

    Returns:
        False if the file system does not support locks, so that the file is not protected.

    Raises:
        InUseError: the file is open elsewhere in a way that excludes this; names the processes that
            /proc shows.
    """
    used = [_CONSISTENT_READ] + ([_WRITE, _RESIZE] if write else [])
    unshared = [_WRITE, _RESIZE]
    mine = [_USED + p for p in used] + [_UNSHARED + p for p in unshared]
    try:
        for byte in mine:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        conflict = any(_taken(fd, _UNSHARED + p) for p in used) or any(
            _taken(fd, _USED + p) for p in [*unshared, _WRITE_UNCHANGED]
        )
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP}:
            return False
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            conflict = True
        else:
            raise HostIOError(f"it cannot be locked: {error.strerror}", path=path) from error
    if conflict:
        for byte in mine:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))
        raise InUseError(
            f"it is in use by {holders(fd) or 'another program'}, so it cannot be opened for "
            + ("writing" if write else "reading"),
            path=path,
            hint="close it there first (vhdx stop, if a server of yours has it)",
        )
    return True


def downgrade(fd: int) -> None:
    """Reduces a writer's locks to a reader's."""
    with contextlib.suppress(OSError):  # a file system without locks
        for byte in (_USED + _WRITE, _USED + _RESIZE):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))


def holders(fd: int) -> str:
    """The processes that hold locks on the file, as far as /proc shows them."""
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            names = os.listdir(process / "fdinfo")
        except OSError:
            continue
        for name in names:
            if process.name == str(os.getpid()) and name == str(fd):
                continue
            try:
                if f" {inode} " in (process / "fdinfo" / name).read_text(errors="replace"):
                    command = (process / "comm").read_text(errors="replace").strip()
                    own = process.name == str(os.getpid())
                    found.append(f"{command} ({'this ' if own else ''}process {process.name})")
                    break
            except OSError:
                continue
    return " and ".join(found)
