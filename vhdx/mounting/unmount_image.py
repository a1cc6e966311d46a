# SPDX-License-Identifier: MIT
"""Unmounts and detaches, and says what did not reach the image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import image
from vhdx.errors import (
    HostIOError,
    InUseError,
    InvalidArgumentError,
)
from vhdx.interrupts import uninterruptible
from vhdx.mounting import records, system
from vhdx.mounting.attachments import (
    check_alive,
    check_writes,
    detach_image,
    report_problems,
    require_root,
)
from vhdx.mounting.lookup import find_image, nothing_there
from vhdx.mounting.programs import run
from vhdx.mounting.records import Attachment, Mount, State

if TYPE_CHECKING:
    from collections.abc import Callable

    StrPath = str | os.PathLike[str]

__all__ = ["detach", "unmount"]


@uninterruptible
def unmount(
    target: StrPath,
    *,
    discard: bool = False,
    commit: bool = False,
    cancel: Callable[[], bool] | None = None,
) -> bool:
    """Unmounts, and detaches the image when nothing of it is mounted any more.

    When it returns, the bytes are durable in the image, and the image is closed.

    Args:
        target: a directory, or an image or device, of which everything is unmounted.
        discard: with ``snapshot=True``: throw the changes away.
        commit: with ``snapshot=True``: merge the changes into the image.
        cancel: called while it waits for another command.

    Returns:
        False if nothing was mounted there.

    Raises:
        NotFoundError: there is no such directory or image.
        InUseError: a program uses the file system; nothing was unmounted.
        InvalidArgumentError: what to do with the changes of a snapshot was not said.
        HostIOError: it is unmounted, but not everything may be in the image; says what happened.
    """
    require_root()
    if discard and commit:
        raise InvalidArgumentError("changes are either discarded or committed")
    found = find_image(target)
    if found is None:
        return nothing_there(target)
    key, directory = found
    with records.locked(key, cancel):
        attachment = records.load(key)
        if attachment is None:
            return False
        chosen = [each for each in attachment.mounts if directory in {None, each.directory}]
        last = len(chosen) == len(attachment.mounts)
        detaching = last and (not attachment.kept or attachment.state is not State.ATTACHED)
        if not attachment.mounts and attachment.state is not State.DETACHING:
            discard, commit = True, False  # the command was killed before anything was mounted
        elif detaching and attachment.overlay is not None and not (discard or commit):
            raise InvalidArgumentError(
                "it was mounted with --snapshot: say what becomes of the changes",
                path=attachment.image,
                hint="--commit merges them into the image, --discard throws them away",
            )
        elif (discard or commit) and attachment.overlay is None:
            raise InvalidArgumentError(
                "it was mounted without --snapshot, so its changes are in the image",
                path=attachment.image,
            )
        dead = check_alive(attachment)
        problems = [] if dead is None else [dead]
        for each in reversed(chosen):
            problems += _unmount_one(attachment, each, dead=dead is not None)
        if detaching:
            problems += detach_image(attachment)
            if discard:
                problems = []
            if not problems:
                _settle(attachment, commit=commit)
        elif dead is None:
            problems += check_writes(attachment)
    report_problems(attachment, problems, kept_overlay=detaching and not discard)
    return True


def _unmount_one(attachment: Attachment, entry: Mount, *, dead: bool) -> list[str]:
    """Unmounts one file system; returns what kept bytes from the image.

    Raises:
        InUseError: a program uses it.
    """
    problems = []
    for directory in entry.directories:
        if not entry.read_only and not dead:
            problem = system.sync_filesystem(directory)
            problems += [] if problem is None else [problem]
        _unmount_directory(directory, entry.device.path, dead=dead)
    attachment.mounts = [each for each in attachment.mounts if each != entry]
    attachment.save()
    others = any(each.device == entry.device for each in attachment.mounts)
    if not attachment.kept and not others:
        if not attachment.read_only and not dead:
            problem = system.sync_device(entry.device.path)
            problems += [] if problem is None else [problem]
        if not entry.device.loop or system.detach_loop(entry.device.path):
            attachment.devices = [each for each in attachment.devices if each != entry.device]
            attachment.save()
    return problems


def _unmount_directory(directory: str, device: str, *, dead: bool) -> None:
    top = system.mounted_at(directory)
    if top is not None and top.source != device:
        raise InUseError(
            f"{top.source} is mounted on top of it", path=directory, hint="unmount that first"
        )
    done = run("umount", directory, seconds=3600)
    if done.code != 0 and dead:
        done = run("umount", "--lazy", directory)
    if done.code != 0:
        users = system.holders(directory)
        if users or "busy" in done.err:
            raise InUseError(
                f"it is in use by {', '.join(users) or 'another mount'}",
                path=directory,
                hint="end that first, then unmount again",
            )
        raise HostIOError(f"it cannot be unmounted: {done.complaint}", path=directory)


def _settle(attachment: Attachment, *, commit: bool) -> None:
    """Merges the changes of a snapshot into the image, or throws them away."""
    if attachment.overlay is None:
        return
    if commit:
        image.merge(attachment.overlay, keep_parent_name=True)
    else:
        Path(attachment.overlay).unlink(missing_ok=True)


@uninterruptible
def detach(target: StrPath, *, cancel: Callable[[], bool] | None = None) -> bool:
    """Detaches an image; returns False if it was not attached.

    Args:
        target: the image, or one of its devices.
        cancel: as for :func:`unmount`.

    Raises:
        InUseError: one of its devices is in use.
        HostIOError: as :func:`unmount`.
    """
    require_root()
    found = find_image(target)
    if found is None:
        return nothing_there(target)
    with records.locked(found[0], cancel):
        attachment = records.load(found[0])
        if attachment is None:
            return False
        mounted = [path for each in attachment.mounts for path in each.directories]
        if mounted:
            raise InUseError(
                f"it is mounted on {', '.join(mounted)}",
                path=attachment.image,
                hint=f"vhdx umount {mounted[0]}",
            )
        dead = check_alive(attachment)
        problems = [] if dead is None else [dead]
        problems += detach_image(attachment)
    report_problems(attachment, problems, kept_overlay=True)
    return True
