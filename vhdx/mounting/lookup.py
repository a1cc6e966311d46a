# SPDX-License-Identifier: MIT
"""Finds the image that a directory, a device or a name of a file stands for."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import place
from vhdx.errors import InvalidArgumentError, NotFoundError
from vhdx.mounting import records, system

if TYPE_CHECKING:
    StrPath = str | os.PathLike[str]

__all__ = ["find_image", "refuse_others"]


def find_image(target: StrPath) -> tuple[tuple[int, int], str | None] | None:
    """The image that a directory, an image or a device names; and the directory, if it is one."""
    path = os.path.realpath(os.fsdecode(target))
    found = records.load_all()
    for attachment in found:
        for each in attachment.mounts:
            if path in each.directories or (each.directory == path and not each.directories):
                return attachment.key, each.directory
    for attachment in found:
        if system.disk_of(path) in {each.path for each in attachment.devices} | {attachment.view}:
            return attachment.key, None
    with contextlib.suppress(OSError):
        key = place.of(path).key(path)
        if any(attachment.key == key for attachment in found) or records.was_begun(key):
            return key, None
    for attachment in found:
        if attachment.image in {path, os.path.abspath(os.fsdecode(target))}:
            return attachment.key, None
    return None


def refuse_others(target: StrPath) -> None:
    """Refuses what is no business of vhdx.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: another program mounted or attached what is there.
    """
    if not os.path.lexists(target):
        raise NotFoundError("there is no such directory or image", path=os.fsdecode(target))
    path = os.path.realpath(os.fsdecode(target))
    if Path(path).is_block_device():
        raise InvalidArgumentError("it was not attached by vhdx", path=path, hint="see vhdx mounts")
    if system.mounted_at(path) is not None:
        raise InvalidArgumentError("it was not mounted by vhdx", path=path, hint="use umount(8)")
