# SPDX-License-Identifier: MIT
"""Unfinished files under a temporary name, which take their final name when they are complete.

The temporary name is ``.NAME.XXXXXXXX.partial``, beside the target. The file is locked as long as a
process writes it. So an unlocked file was left by a process that was killed, and the next process
that makes a file for the same target removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from vhdx.errors import InUseError
from vhdx.image import lock

__all__ = ["create_partial", "is_partial"]

_SUFFIX = re.compile(r"\.[0-9a-f]{8}\.partial")
_LONGEST_NAME = 255
_SUFFIX_LENGTH = len(".01234567.partial")
_MOST_TRIES = 20


def is_partial(name: str) -> bool:
    """Whether this is the name of an unfinished file."""
    return name.startswith(".") and _SUFFIX.fullmatch(name[-_SUFFIX_LENGTH:]) is not None


def _stem(target: Path) -> str:
    room = _LONGEST_NAME - _SUFFIX_LENGTH - 1
    return "." + os.fsdecode(os.fsencode(target.name)[:room])


def create_partial(target: Path) -> tuple[Path, int]:
    """Makes a new, locked file for ``target``, and removes unlocked left-overs for the same target.

    Returns:
        The file's path, and a descriptor for reading and writing.

    Raises:
        OSError: the file cannot be made.
    """
    _remove_left_overs(target)
    for _ in range(_MOST_TRIES):
        path = target.with_name(f"{_stem(target)}.{secrets.token_hex(4)}.partial")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            lock.acquire(fd, os.fspath(target), write=True)
            if _is_named(path, fd):
                return path, fd
        except InUseError:
            # Another process took the file for a left-over and locked it first. It may not get to
            # remove it, so remove it here.
            path.unlink(missing_ok=True)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(fd)
    raise InUseError("its temporary files keep being removed", path=target, hint="try again")


def _is_named(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _remove_left_overs(target: Path) -> None:
    stem = _stem(target)
    try:
        names = os.listdir(target.parent)
    except OSError:
        return  # making the new file will raise the error
    for name in names:
        if name.startswith(stem) and _SUFFIX.fullmatch(name[len(stem) :]):
            with contextlib.suppress(OSError):
                _remove_unlocked(target.with_name(name))


def _remove_unlocked(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        # Without locks it is unknown whether the file is still being written, so it stays.
        if lock.acquire(fd, os.fspath(path), write=True) and _is_named(path, fd):
            path.unlink()
    finally:
        os.close(fd)
