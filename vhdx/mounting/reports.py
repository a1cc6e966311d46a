# SPDX-License-Identifier: MIT
"""What is mounted and attached, and what is wrong with it."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from vhdx.errors import VhdxError
from vhdx.mounting import records
from vhdx.mounting.attaching import require_root
from vhdx.mounting.detaching import check_alive
from vhdx.mounting.records import Attachment, State

__all__ = ["MountReport", "mounts", "servers_in_use"]


class MountReport(NamedTuple):
    """A mount of an attached image; what is not mounted has a report for each device.

    Attributes:
        image: the path that the user named.
        way: "nbd" or "fuse".
        mode: "r" or "r+"; "snapshot" where a differencing image takes the changes.
        device: the block device.
        partition: its number; None for the whole disk.
        filesystem: its type.
        directory: where it is mounted; None if it is not.
        pid: the process of the server.
        problem: what is wrong, and the way out; None if nothing is.
    """

    image: str
    way: str
    mode: str
    device: str | None
    partition: int | None
    filesystem: str | None
    directory: str | None
    pid: int | None
    problem: str | None


def mounts() -> list[MountReport]:
    """Everything that is attached or mounted by vhdx on this machine, oldest first.

    Raises:
        HostIOError: the caller is not root.
    """
    require_root()
    unreadable: list[VhdxError] = []
    found = []
    for attachment in records.load_all(unreadable):
        problem = _problem(attachment)
        mode = "r" if attachment.read_only else "r+"
        mode = mode if attachment.overlay is None else "snapshot"
        pid = None if attachment.server is None else attachment.server.pid
        base = (attachment.image, attachment.way, mode)
        used = {each.device for each in attachment.mounts}
        for each in attachment.mounts:
            there = each.directories
            trouble = problem
            if trouble is None and not there:
                trouble = f"not mounted any more: vhdx umount {each.directory} detaches it"
            found.append(
                MountReport(
                    *base,
                    each.device.path,
                    each.device.partition,
                    each.filesystem,
                    there[0] if there else each.directory,
                    pid,
                    trouble,
                )
            )
        found += [
            MountReport(*base, device.path, device.partition, None, None, pid, problem)
            for device in attachment.devices
            if device not in used
        ]
        if not attachment.devices:
            found.append(MountReport(*base, attachment.view, None, None, None, pid, problem))
    for error in unreadable:
        problem = f"{error.message}; {error.hint}"
        found.append(MountReport(str(error.path), "?", "?", None, None, None, None, None, problem))
    return found


def servers_in_use() -> dict[int, list[str]]:
    """For each server of an attached image, by process: directories, or devices if not mounted."""
    found: dict[int, list[str]] = {}
    with contextlib.suppress(VhdxError):
        for each in mounts():
            if each.pid is not None and each.problem is None:
                where = each.directory or each.device
                found.setdefault(each.pid, []).extend([where] if where else [])
    return found


def _problem(attachment: Attachment) -> str | None:
    if records.is_locked(attachment.key) and attachment.state is not State.ATTACHED:
        return f"{attachment.state.value} now"
    if attachment.state is State.DETACHED:
        return f"its changes wait: {attachment.way_out}"
    if attachment.state is not State.ATTACHED:
        return f"a command ended while {attachment.state.value}: {attachment.way_out}"
    if not attachment.is_here:
        return "it is attached in another mount namespace"
    problem = check_alive(attachment)
    if problem is not None:
        return f"{problem}, so every access fails: {attachment.way_out}"
    if not attachment.kept and not attachment.mounts:
        return f"it is unmounted, and still attached: {attachment.way_out}"
    return None
