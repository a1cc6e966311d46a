# SPDX-License-Identifier: MIT
"""Mounts file systems of images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import InUseError, InvalidArgumentError, NotFoundError, VhdxError
from vhdx.interrupts import uninterruptible
from vhdx.mounting import filesystems, partitions, records, system
from vhdx.mounting.attaching import Wish, attached, key_of, require_root
from vhdx.mounting.devices import (
    choose_partition,
    content_in,
    device_of,
    give_up,
    needs_replay,
)
from vhdx.mounting.records import Attachment, Device, Mount

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    StrPath = str | os.PathLike[str]

__all__ = ["Mounted", "mount"]


class Mounted(NamedTuple):
    """What :func:`mount` did.

    Attributes:
        directory: where the file system is mounted.
        device: the block device that is mounted.
        partition: its number; None for the whole disk.
        filesystem: its type.
        way: "nbd" or "fuse".
        notes: what the user should know.
    """

    directory: str
    device: str
    partition: int | None
    filesystem: str
    way: str
    notes: tuple[str, ...] = ()


@uninterruptible
def mount(
    path: StrPath,
    directory: StrPath,
    *,
    partition: int | None = None,
    read_only: bool = False,
    filesystem: str | None = None,
    options: str = "",
    via: str | None = None,
    yes: bool = False,
    snapshot: bool = False,
    format: str | None = None,
    parent_search: Sequence[StrPath] = (),
    cancel: Callable[[], bool] | None = None,
) -> Mounted:
    """Mounts a file system of an image. A second call with the same arguments does nothing.

    The image is served on a private socket, shown to the kernel, and mounted with ``nosuid`` and
    ``nodev``. It stays mounted when the calling program ends, until :func:`unmount`.

    Args:
        path: of the image.
        directory: an empty directory.
        partition: its number; None: the only partition with a file system, or the whole disk.
        read_only: do not change one byte of the image.
        filesystem: the type, as mount(8) names it; None: as found.
        options: more options for mount(8), separated by commas.
        via: "nbd" or "fuse"; None: the best that this machine has.
        yes: agree to the replay of a journal, or to the loss of a hibernated Windows session.
        snapshot: changes go to a differencing image; :func:`unmount` keeps them or throws them away.
        format, parent_search: as for :func:`vhdx.open`.
        cancel: called now and then; nothing stays mounted if it returns True.

    Raises:
        NotFoundError: there is no such image, directory or partition.
        InUseError: the image, the directory or the file system is in use.
        UnsupportedError: what the partition holds cannot be mounted here; the message says why.
        VhdxError: the user must agree first (reason NEEDS_CONSENT), or the mount failed.
    """
    require_root()
    where, key = _mount_point(directory), key_of(path)
    if snapshot and read_only:
        raise InvalidArgumentError("--snapshot takes changes, and --read-only allows none")
    filesystems.check_options(options, read_only=read_only)
    wish = Wish(
        path=os.path.abspath(os.fsdecode(path)),
        read_only=read_only,
        kept=False,
        via=via,
        snapshot=snapshot,
        format=format,
        parent_search=[os.fsdecode(each) for each in parent_search],
        cancel=cancel,
    )
    with records.locked(key, cancel):
        if system.mounted_at(where) is None:
            _check_empty(where)
        try:
            with attached(key, wish) as attachment:
                found = _mounted_there(attachment, where, partition)
                if found is not None:
                    return found
                if system.mounted_at(where) is not None:
                    raise InUseError(
                        "something is mounted there already", path=where, hint="see findmnt"
                    )
                return _mount_partition(
                    attachment,
                    where,
                    choose_partition(attachment, partition, filesystem),
                    wanted=None if filesystem == "auto" else filesystem,
                    options=options,
                    yes=yes,
                )
        except VhdxError as error:
            if error.path is None or str(error.path).startswith(os.fspath(records.DIRECTORY)):
                error.path = wish.path
            raise


def _mount_point(directory: StrPath) -> str:
    """The real path of a directory that may be mounted on."""
    path = os.path.realpath(os.fsdecode(directory))
    if not os.path.isdir(path):
        exists = os.path.lexists(path)
        raise (InvalidArgumentError if exists else NotFoundError)(
            "it is not a directory" if exists else "there is no such directory",
            path=path,
            hint="vhdx mount IMAGE DIRECTORY" if exists else f"mkdir {path}",
        )
    return path


def _check_empty(path: str) -> None:
    with os.scandir(path) as entries:
        empty = next(entries, None) is None
    if not empty:
        raise InvalidArgumentError(
            "it is not empty, and a mount would hide what it contains",
            path=path,
            hint="mount on an empty directory",
        )


def _mounted_there(attachment: Attachment, where: str, partition: int | None) -> Mounted | None:
    """The mount of this image on that directory, if it is the wanted one."""
    for each in attachment.mounts:
        there = each.directory == where and where in each.directories
        if there and partition in {None, each.device.partition}:
            return Mounted(
                where,
                each.device.path,
                each.device.partition,
                each.filesystem,
                attachment.way,
                ("it was mounted already",),
            )
    return None


def _mount_partition(
    attachment: Attachment,
    where: str,
    partition: partitions.Partition | None,
    *,
    wanted: str | None,
    options: str,
    yes: bool,
) -> Mounted:
    content = content_in(attachment, partition, wanted)
    device = device_of(attachment, partition)
    fresh = device not in attachment.devices
    if any(each.device == device for each in attachment.mounts):
        raise InUseError(
            f"{_name(device)} is mounted already", path=attachment.image, hint="see vhdx mounts"
        )
    attachment.devices = [*attachment.devices, *([device] if fresh else [])]
    attachment.save()
    try:
        made = filesystems.plan(
            content,
            wanted=wanted,
            read_only=attachment.read_only,
            yes=yes,
            needs_replay=lambda kind: needs_replay(attachment, partition, kind),
            device=device.path,
        )
        entry = Mount(where, device, made.kind, attachment.read_only)
        attachment.mounts = [*attachment.mounts, entry]
        attachment.save()
        try:
            filesystems.mount(
                made, device.path, where, read_only=attachment.read_only, options=options
            )
        except BaseException:
            attachment.mounts = [each for each in attachment.mounts if each is not entry]
            attachment.save()
            raise
    except BaseException:
        if fresh:
            give_up(attachment, device)
        raise
    return Mounted(where, device.path, device.partition, made.kind, attachment.way, made.notes)


def _name(device: Device) -> str:
    return "the disk" if device.partition is None else f"partition {device.partition}"
