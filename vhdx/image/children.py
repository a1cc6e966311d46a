# SPDX-License-Identifier: MIT
"""Who is based on an image, so that nobody changes it under them.

An image does not know its children. They are looked for in the image's own directory, and where a
hint says that there are some elsewhere: an extended attribute of the image's file, which others
ignore. What makes a file a child depends on the format; ``children.py`` of each format decides it.

Hint (``user.vhdx.children``): ``vhdx children 1``, CRC-32C of the rest (8 hexadecimal digits), and
the absolute paths of children, each behind a NUL byte. It is replaced as a whole. Recovery: one that
does not fit its checksum counts as none; a path that leads to no child is ignored, and dropped when
the next child is added.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
from pathlib import Path

import google_crc32c

from vhdx.image.attributes import OWN_PREFIX

__all__ = ["guard_replaced", "hinted", "note_child", "pack_hint", "parse_hint", "shown"]

StrPath = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_HINT = OWN_PREFIX + "children"
_HEAD = b"vhdx children 1"
_LARGEST_HINT = 2048  # ext4 has 4 KiB at most for all attributes of a file
_FORMATS = ("vhdx.image.vhdx.children", "vhdx.image.vhd.children")


def pack_hint(paths: list[str]) -> bytes:
    """The attribute's value; the oldest paths are left out where there are too many."""
    encoded = [b"\0" + os.fsencode(path) for path in paths]
    while sum(map(len, encoded)) > _LARGEST_HINT - len(_HEAD) - 9:
        del encoded[0]
    body = b"".join(encoded)
    return _HEAD + b" %08x" % google_crc32c.value(body) + body


def parse_hint(value: bytes) -> list[str]:
    """The paths in an attribute's value; none where it is not whole."""
    head, body = value[: len(_HEAD) + 9], value[len(_HEAD) + 9 :]
    if head != _HEAD + b" %08x" % google_crc32c.value(body):
        return []
    return [os.fsdecode(path) for path in body.split(b"\0")[1:] if path]


def hinted(path: StrPath) -> list[str]:
    """The paths that the hint at the image ``path`` names."""
    try:
        return parse_hint(os.getxattr(path, _HINT))
    except OSError:
        return []  # none, or a file system without them


def note_child(path: StrPath, child: StrPath, *, of: StrPath | None = None) -> None:
    """Leaves a hint at the image ``path`` that ``child`` is based on it, or is about to be.

    Args:
        path: of the image now.
        child: where the child is, or will be.
        of: where the image will be; ``path`` when None.
    """
    name = os.path.realpath(child)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # some file systems have no such locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            kept = [each for each in hinted(path) if each != name and os.path.lexists(each)]
            os.setxattr(fd, _HINT, pack_hint([*kept, name]))
        finally:
            os.close(fd)
    except OSError as error:
        there = os.path.realpath(path if of is None else of)
        if os.path.dirname(name) != os.path.dirname(there):
            _log.warning(
                "%s: no hint of %s can be left there (%s), so a change of it will not be refused",
                there,
                name,
                error.strerror,
            )


def guard_replaced(path: StrPath) -> None:
    """Refuses to replace a file that another image depends on.

    Raises:
        InUseError: naming the child.
    """
    for each in _FORMATS:  # they stand above this module, so they are found by name
        importlib.import_module(each).guard_replaced(path)


def shown(child: Path, path: StrPath) -> str:
    """``child`` as messages name it: without the directory where that is the image's, too."""
    beside = child.parent == Path(os.path.realpath(path)).parent
    return child.name if beside else os.fspath(child)
