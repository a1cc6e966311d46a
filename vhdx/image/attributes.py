# SPDX-License-Identifier: MIT
"""Keeps owner, mode, ACL and extended attributes when a new file replaces another one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from vhdx.errors import HostIOError, Reason

__all__ = ["OWN_PREFIX", "check_owner", "copy_attributes"]

OWN_PREFIX = "user.vhdx."
"""Prefix of extended attributes that describe one file only, so they are not copied."""

_ACL = "system.posix_acl_access"
_PRIVILEGED = ("security.", "trusted.")
_NOT_THERE = {errno.ENOTSUP, errno.ENODATA}


def check_owner(source: str | os.PathLike[str]) -> None:
    """Raises if a new file cannot get the owner and group of ``source``.

    Raises:
        HostIOError: reason PERMISSION.
    """
    status = os.stat(source)
    groups = {os.getegid(), *os.getgroups()}
    if os.geteuid() not in {0, status.st_uid} or (os.geteuid() and status.st_gid not in groups):
        raise _refused(source, status)


def _refused(source: str | os.PathLike[str], status: os.stat_result) -> HostIOError:
    return HostIOError(
        f"a new file cannot be given to its owner (user {status.st_uid}, group {status.st_gid})",
        reason=Reason.PERMISSION,
        path=source,
        hint="run the command as root, or as that user",
    )


def copy_attributes(source: str | os.PathLike[str], fd: int) -> None:
    """Gives the open file ``fd`` the owner, mode, ACL, labels and attributes of ``source``.

    Raises:
        HostIOError: the owner or an attribute cannot be copied.
    """
    wanted, now = os.stat(source), os.fstat(fd)
    if (wanted.st_uid, wanted.st_gid) != (now.st_uid, now.st_gid):
        try:
            os.fchown(fd, wanted.st_uid, wanted.st_gid)
        except OSError as error:
            raise _refused(source, wanted) from error
    names = _names(source)
    if _ACL not in names:  # an ACL inherited from the directory would let others in
        with contextlib.suppress(OSError):
            os.removexattr(fd, _ACL)
    try:
        os.fchmod(fd, stat.S_IMODE(wanted.st_mode))
    except OSError as error:
        raise HostIOError(f"its mode cannot be kept: {error.strerror}", path=source) from error
    for name in names:
        _copy(source, fd, name)


def _names(source: str | os.PathLike[str]) -> list[str]:
    try:
        return [name for name in os.listxattr(source) if not name.startswith(OWN_PREFIX)]
    except OSError:
        return []  # a file system without them


def _copy(source: str | os.PathLike[str], fd: int, name: str) -> None:
    try:
        value = os.getxattr(source, name)
        with contextlib.suppress(OSError):
            if os.getxattr(fd, name) == value:
                return  # a label that the system set already
        os.setxattr(fd, name, value)
    except OSError as error:
        if error.errno in _NOT_THERE or name.startswith(_PRIVILEGED):
            return  # it was removed meanwhile, or only the system may set it
        raise HostIOError(
            f"its extended attribute {name} cannot be kept: {error.strerror}", path=source
        ) from error
