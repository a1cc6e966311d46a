# SPDX-License-Identifier: MIT
"""Image locks that QEMU understands.

QEMU's file driver takes open-file-description locks on single bytes: byte ``100 + p`` says "I use
permission p", byte ``200 + p`` says "I do not share permission p"; both as read locks, so that they
never exclude each other. Then each side looks whether the other's byte is taken. vhdx does the same,
so images are guarded between vhdx, qemu-img, qemu-nbd and QEMU alike (block/file-posix.c,
include/block/block-common.h).

Readers use CONSISTENT_READ and do not share WRITE and RESIZE; a writer uses these too. The locks
belong to the open file description: they go when it is closed, also by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from vhdx.errors import HostIOError, InUseError

__all__ = ["acquire", "downgrade"]

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
        False where the file system knows no locks, so that nobody can be kept out.

    Raises:
        InUseError: somebody else has it open in a way that excludes this; says who where /proc
            shows it.
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
            f"it is in use by {_holders(fd) or 'another program'}, so it cannot be opened for "
            + ("writing" if write else "reading"),
            path=path,
            hint="close it there first (vhdx stop, if a server of yours has it)",
        )
    return True


def downgrade(fd: int) -> None:
    """A writer's locks become a reader's."""
    with contextlib.suppress(OSError):  # a file system without locks
        for byte in (_USED + _WRITE, _USED + _RESIZE):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))


def _holders(fd: int) -> str:
    """Who has locks on the file, as far as /proc lets us see."""
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
