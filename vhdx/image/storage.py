# SPDX-License-Identifier: MIT
"""What block devices lie on: their node in /dev, their disk, the file of a loop device."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

__all__ = ["is_read_only", "kernel_node", "share_storage"]

_BLKROGET = 0x125E  # linux/fs.h
_SECTOR = 512


def is_read_only(fd: int) -> bool:
    """Whether the kernel refuses writes to an open block device."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(fd, _BLKROGET, answer)
    except OSError:
        return False
    return bool(struct.unpack("i", answer)[0])


def _directory(device: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def kernel_node(path: str) -> str:
    """The node in /dev of a block device, by which every program locks it; else ``path``.

    A device can have other nodes, made by mknod, and locks belong to a node.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISBLK(status.st_mode):
            return path
        for line in (_directory(status.st_rdev) / "uevent").read_text().splitlines():
            key, _, value = line.partition("=")
            node = f"/dev/{value}"
            if key == "DEVNAME" and os.stat(node).st_rdev == status.st_rdev:
                return node
    except (OSError, ValueError):
        pass
    return path


class _Layer(NamedTuple):
    """A device or file, and which of its bytes are meant: from start up to end."""

    key: tuple[int, int]
    start: int
    end: int


def _number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def _layers(path: str) -> list[_Layer]:
    """What the path lies on, from itself down, as far as the kernel says it."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return []
    if not stat.S_ISBLK(status.st_mode):
        return [_Layer((status.st_dev, status.st_ino), 0, 1 << 62)]
    device, start, end = status.st_rdev, 0, 1 << 62
    found = [_Layer((device, 0), start, end)]
    here = _directory(device)
    if (here / "partition").exists():
        start = _number(here / "start") * _SECTOR
        end = start + _number(here / "size") * _SECTOR
        with contextlib.suppress(OSError, ValueError):
            major, minor = (here.resolve().parent / "dev").read_text().split(":")
            found.append(_Layer((os.makedev(int(major), int(minor)), 0), start, end))
        here = here.resolve().parent
    with contextlib.suppress(OSError, ValueError):
        backing = os.stat((here / "loop" / "backing_file").read_text().rstrip("\n"))
        offset = _number(here / "loop" / "offset")
        found.append(_Layer((backing.st_dev, backing.st_ino), start + offset, end + offset))
    return found


def share_storage(path: str, other: str) -> bool:
    """Whether two paths lead to storage that has bytes in common.

    They do if both are one file or device, a partition and its disk, two loop devices over one file,
    or a loop device and its file. Devices of the device mapper are not looked through.
    """
    for mine in _layers(path):
        for theirs in _layers(other):
            if mine.key == theirs.key and mine.start < theirs.end and theirs.start < mine.end:
                return True
    return False
