# SPDX-License-Identifier: MIT
"""Detaches images step by step, and keeps account of why bytes may be missing from them."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vhdx import control
from vhdx.errors import HostIOError, InUseError, VhdxError
from vhdx.mounting import system, ways
from vhdx.mounting.messages import Result
from vhdx.mounting.programs import last_line, run, wait_until
from vhdx.mounting.records import State

if TYPE_CHECKING:
    from vhdx.mounting.records import Attachment, Device

__all__ = [
    "check_alive",
    "check_here",
    "check_writes",
    "detach_image",
    "finish",
    "recover",
    "release_device",
    "report_problems",
    "undo",
]

_CLOSE_SECONDS = 120.0
_IDLE_SECONDS = 3.0


def check_here(attachment: Attachment) -> None:
    """Refuses what cannot be seen from here.

    Raises:
        InUseError: it is attached in another mount namespace.
    """
    if not attachment.is_here and attachment.server is not None and attachment.server.alive:
        raise InUseError(
            "it is attached in another mount namespace",
            path=attachment.image,
            hint=f"nsenter --mount --target {attachment.server.pid} {attachment.way_out}",
        )


def check_alive(attachment: Attachment) -> str | None:
    """What is wrong with an attached image; None if nothing is."""
    if attachment.server is None or not attachment.server.alive:
        return "its server has died"
    return ways.of(attachment).problem(attachment)


def check_writes(attachment: Attachment) -> None:
    """Asks the server how many writes failed; for an image that stays attached."""
    assert attachment.server is not None
    for each in control.servers(everywhere=True):
        if each.pid == attachment.server.pid and each.answers:
            _note_failed(attachment, sum(one.failed_writes for one in each.connections))
            return
    attachment.problems.append("the server does not answer")


def _note_failed(attachment: Attachment, count: int) -> None:
    if count:
        log = last_line(attachment.directory / "server.log")
        attachment.problems.append(
            f"{count} writes of the kernel failed (a full disk, or an I/O error)"
            + (f": {log}" if log else "")
        )


def detach_image(attachment: Attachment) -> None:
    """Detaches an image; the caller holds its lock. Its record and differencing image stay.

    It goes on after a failure, so that as little as possible stays behind, and adds to
    ``problems`` of the attachment why bytes may be missing from the image.

    Raises:
        InUseError: a device is still in use; the image stays attached.
    """
    check_here(attachment)
    if attachment.state is State.DETACHED:
        return
    dead = check_alive(attachment)
    if dead is None:
        _check_idle(attachment)
    elif attachment.devices:  # what the kernel had not written yet is lost
        attachment.problems.append(dead)
    if attachment.state is not State.ATTACHING:
        attachment.state = State.DETACHING
    attachment.save()
    _release(attachment)
    attachment.problems += ways.of(attachment).detach(attachment)
    _stop_server(attachment)
    attachment.state = State.DETACHED
    attachment.save()


def _check_idle(attachment: Attachment) -> None:
    """Waits for a moment until no device is in use; some file systems let go late."""
    used = {each.path for each in attachment.devices} | {attachment.view or ""}
    used |= set(system.loops_of(attachment.view)) if attachment.view else set()
    devices = sorted(each for each in used if each.startswith("/dev/"))
    if not wait_until(lambda: not any(map(system.is_busy, devices)), _IDLE_SECONDS):
        busy = ", ".join(each for each in devices if system.is_busy(each))
        raise InUseError(
            f"{busy} is in use (mounted, or claimed by LVM, a RAID or cryptsetup)",
            path=attachment.image,
            hint="findmnt and lsblk show by what",
        )


def _release(attachment: Attachment) -> None:
    """Writes back and detaches the devices, those included that a killed command had just made."""
    for device in attachment.devices:
        release_device(attachment, device)
    for each in system.mounts():
        if Path(each.directory).parent == attachment.directory and "try-" in each.directory:
            run("umount", each.directory)
    for path in system.loops_of(attachment.view) if attachment.view else ():
        system.detach_loop(path)
    attachment.devices = []
    attachment.save()


def release_device(attachment: Attachment, device: Device) -> bool:
    """Writes back a device, and detaches it; returns False if it stays attached."""
    if not attachment.read_only and check_alive(attachment) is None:
        problem = system.sync_device(device.path)
        attachment.problems += [] if problem is None else [problem]
    if not device.loop or system.detach_loop(device.path):
        return True
    attachment.problems.append(f"{device.path} stays attached until what uses it ends")
    return False


def _stop_server(attachment: Attachment) -> None:
    """Ends the server, and reads what became of the image."""
    server = attachment.server
    if server is None:
        return
    server.signal(signal.SIGTERM)
    if not wait_until(lambda: not server.alive, _CLOSE_SECONDS):
        server.end(0.0)
    try:
        result = msgspec.convert(json.loads((attachment.directory / "result").read_bytes()), Result)
    except FileNotFoundError:
        attachment.problems.append("the server was killed, so what was not synced may be missing")
        return
    except ValueError as error:
        attachment.problems.append(f"what the server says cannot be understood: {error}")
        return
    _note_failed(attachment, result.failed_writes)
    if result.error is not None:
        attachment.problems.append(f"the image could not be closed: {result.error}")


def recover(attachment: Attachment) -> None:
    """Removes what serves nothing any more; the caller holds the lock.

    Raises:
        InUseError: it is mounted, or has changes of which nobody has said what becomes of them.
        HostIOError: bytes may be missing from the image.
    """
    if attachment.state is State.ATTACHING:
        undo(attachment)
        return
    mounted = [path for each in attachment.mounts for path in each.directories]
    if mounted or attachment.overlay is not None:
        what = f"it is mounted on {mounted[0]}" if mounted else "changes of --snapshot wait"
        raise InUseError(what, path=attachment.image, hint=attachment.way_out)
    detach_image(attachment)
    finish(attachment)


def finish(attachment: Attachment) -> None:
    """Removes the record of a detached image.

    Raises:
        HostIOError: bytes may be missing from the image; the message says why.
    """
    attachment.remove()
    report_problems(attachment)


def report_problems(attachment: Attachment) -> None:
    """Reports why bytes may be missing from an image.

    Raises:
        HostIOError: there are such reasons.
    """
    problems = list(dict.fromkeys(attachment.problems))
    if problems and not attachment.read_only:
        raise HostIOError(
            "it is unmounted, but not everything may be in the image: " + "; ".join(problems),
            path=attachment.image,
            hint="what was synced before is there; check the file system the next time",
        )


def undo(attachment: Attachment) -> None:
    """Removes an attachment of which nothing was mounted; its differencing image is empty."""
    with contextlib.suppress(VhdxError):
        detach_image(attachment)
        if attachment.overlay is not None:
            Path(attachment.overlay).unlink(missing_ok=True)
        attachment.remove()
