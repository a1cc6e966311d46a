# SPDX-License-Identifier: MIT
"""Unmounts and detaches, and says what did not reach the image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import image
from vhdx.errors import HostIOError, InUseError, InvalidArgumentError, NotFoundError
from vhdx.interrupts import uninterruptible
from vhdx.mounting import records, system
from vhdx.mounting.attaching import require_root
from vhdx.mounting.detaching import (
    check_alive,
    check_here,
    check_writes,
    detach_image,
    finish,
    recover,
    release_device,
    report_problems,
    undo,
)
from vhdx.mounting.lookup import find_image, refuse_others
from vhdx.mounting.programs import run
from vhdx.mounting.records import Attachment, Mount, State

if TYPE_CHECKING:
    from collections.abc import Callable

    StrPath = str | os.PathLike[str]

__all__ = ["detach", "unmount"]

_UMOUNT_SECONDS = 3600.0  # everything that is not written yet has to be


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
        InUseError: a program uses the file system or its device; it stays attached.
        InvalidArgumentError: what to do with the changes of a snapshot was not said.
        HostIOError: it is unmounted, but not everything may be in the image; says what happened.
    """
    require_root()
    if discard and commit:
        raise InvalidArgumentError("changes are either discarded or committed")
    found = find_image(target)
    if found is None:
        return _nothing(target, words=discard or commit)
    key, directory = found
    with records.locked(key, cancel):
        attachment = records.load(key)
        if attachment is None:
            return _nothing(target, words=discard or commit)
        check_here(attachment)
        if attachment.state is State.ATTACHING:
            undo(attachment)  # a command was killed before anything was mounted
            return True
        chosen = [each for each in attachment.mounts if directory in {None, each.directory}]
        ending = len(chosen) == len(attachment.mounts) and (
            not attachment.kept or attachment.state is not State.ATTACHED
        )
        _check_words(attachment, ending=ending, discard=discard, commit=commit)
        dead = check_alive(attachment)
        for each in reversed(chosen):
            _unmount_one(attachment, each, dead=dead is not None)
        if ending:
            detach_image(attachment)
            _settle(attachment, discard=discard, commit=commit)
            finish(attachment)
        elif chosen:
            _report_what_stays(attachment, dead)
        return bool(chosen) or ending


def _nothing(target: StrPath, *, words: bool) -> bool:
    """Returns False: nothing of vhdx is mounted there.

    Raises:
        NotFoundError: there is no such file, or there should be changes of a snapshot.
        InvalidArgumentError: another program mounted or attached what is there.
    """
    refuse_others(target)
    if words:
        raise NotFoundError(
            "nothing is mounted there, so there are no changes to keep or to throw away",
            path=os.fsdecode(target),
            hint="after a restart of the machine, see docs/mounting.md",
        )
    return False


def _check_words(attachment: Attachment, *, ending: bool, discard: bool, commit: bool) -> None:
    """Checks that it is said what becomes of changes, where there are some, and only there."""
    said = discard or commit
    if attachment.overlay is None and said:
        raise InvalidArgumentError(
            "it was mounted without --snapshot, so its changes are in the image",
            path=attachment.image,
        )
    if said and not ending:
        raise InvalidArgumentError(
            "other partitions of it are mounted; say that when the last one is unmounted",
            path=attachment.image,
        )
    if attachment.overlay is not None and ending and not said:
        raise InvalidArgumentError(
            "it was mounted with --snapshot: say what becomes of the changes",
            path=attachment.image,
            hint="--commit merges them into the image, --discard throws them away",
        )


def _unmount_one(attachment: Attachment, entry: Mount, *, dead: bool) -> None:
    """Unmounts one file system.

    Raises:
        InUseError: a program uses it.
    """
    for directory in entry.directories:
        if not entry.read_only and not dead:
            problem = system.sync_filesystem(directory)
            attachment.problems += [] if problem is None else [problem]
        _unmount_directory(directory, entry.device.path, dead=dead)
    attachment.mounts = [each for each in attachment.mounts if each != entry]
    attachment.save()
    others = any(each.device == entry.device for each in attachment.mounts)
    if not attachment.kept and not others and attachment.mounts:
        if release_device(attachment, entry.device):
            attachment.devices = [each for each in attachment.devices if each != entry.device]
        attachment.save()


def _unmount_directory(directory: str, device: str, *, dead: bool) -> None:
    top = system.mounted_at(directory)
    if top is not None and top.source != device:
        raise InUseError(
            f"{top.source} is mounted on top of it", path=directory, hint="unmount that first"
        )
    done = run("umount", directory, seconds=_UMOUNT_SECONDS)
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


def _report_what_stays(attachment: Attachment, dead: str | None) -> None:
    """Reports failed writes of an image that stays attached."""
    if dead is None:
        check_writes(attachment)
    else:
        attachment.problems.append(dead)
    try:
        report_problems(attachment)
    finally:
        attachment.problems = []
        attachment.save()


def _settle(attachment: Attachment, *, discard: bool, commit: bool) -> None:
    """Merges the changes of a snapshot into the image, or throws them away.

    Raises:
        HostIOError: not all changes are there; a second call merges those that are.
        VhdxError: they cannot be merged; they stay.
    """
    if attachment.overlay is None:
        return
    if discard:
        Path(attachment.overlay).unlink(missing_ok=True)
        attachment.problems = []
    elif commit:
        problems, attachment.problems = attachment.problems, []
        if problems:
            attachment.save()
            raise HostIOError(
                "not all changes were written: " + "; ".join(dict.fromkeys(problems)),
                path=attachment.image,
                hint=f"the others are in {attachment.overlay}; --commit again merges them",
            )
        image.merge(attachment.overlay, keep_parent_name=True)


@uninterruptible
def detach(target: StrPath, *, cancel: Callable[[], bool] | None = None) -> bool:
    """Detaches an image; returns False if it was not attached.

    Args:
        target: the image, or one of its devices.
        cancel: as for :func:`unmount`.

    Raises:
        InUseError: one of its devices is in use, or it has changes of a snapshot.
        HostIOError: as :func:`unmount`.
    """
    require_root()
    found = find_image(target)
    if found is None:
        return _nothing(target, words=False)
    with records.locked(found[0], cancel):
        attachment = records.load(found[0])
        if attachment is None:
            return False
        check_here(attachment)
        recover(attachment)
    return True
