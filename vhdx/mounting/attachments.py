# SPDX-License-Identifier: MIT
"""Attaches images: a private server, then one of the ways to show its disk to the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from vhdx import control, image
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnsupportedError,
    VhdxError,
)
from vhdx.mounting import records, system, ways
from vhdx.mounting.messages import Result, Started, Wanted
from vhdx.mounting.programs import last_line, run, spawn, wait_until
from vhdx.mounting.records import Attachment, Device, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vhdx.interrupts import Cancel

    StrPath = str | os.PathLike[str]

__all__ = [
    "Wish",
    "attached",
    "check_alive",
    "check_here",
    "check_writes",
    "detach_image",
    "finish",
    "key_of",
    "recover",
    "release_device",
    "report_problems",
    "require_root",
    "scratch",
    "undo",
]

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
_CLOSE_SECONDS = 120.0
_IDLE_SECONDS = 3.0


def require_root() -> None:
    """Refuses users who cannot mount.

    Raises:
        HostIOError: the caller is not root.
    """
    if os.geteuid() != 0:
        raise HostIOError(
            "only root can attach and mount",
            reason=Reason.PERMISSION,
            hint=f"sudo {os.path.basename(sys.argv[0]) or 'vhdx'} ...; without root, vhdx convert, "
            "or vhdx serve with a program that speaks NBD (guestfish, qemu)",
        )


def _ask_server(attachment: Attachment, wanted: Wanted, cancel: Callable[[], bool] | None) -> Started:
    """Starts the server; returns what it says once it serves.

    Raises:
        VhdxError: what kept it from opening the image.
    """
    reader, writer = os.pipe()
    try:
        spawn(
            [
                sys.executable,
                "-P",
                "-m",
                "vhdx.mounting.daemon",
                json.dumps(msgspec.to_builtins(wanted)),
            ],
            output=writer,
            errors=attachment.directory / "server.log",
            remember=attachment.remember_server,
        )
        os.close(writer)
        writer = -1
        text = b""
        while not text.endswith(b"\n"):
            if cancel is not None and cancel():
                raise VhdxError("the operation was cancelled", reason=Reason.CANCELLED)
            if select.select([reader], [], [], 0.1)[0]:
                piece = os.read(reader, 65536)
                if not piece:
                    break
                text += piece
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if not text:
        log = last_line(attachment.directory / "server.log")
        raise HostIOError(f"the server ended: {log or 'it was killed'}")
    started = msgspec.convert(json.loads(text), Started)
    if started.error is not None:
        raise started.error.exception()
    return started


def attach_image(key: tuple[int, int], wish: Wish) -> Attachment:
    """Attaches an image; the caller holds its lock. If it fails, nothing stays.

    Raises:
        VhdxError: the image cannot be opened, or the machine cannot attach it.
    """
    way = ways.choose(wish.via)
    if wish.snapshot and wish.parent_search:
        raise InvalidArgumentError("--snapshot finds parents by their names only (no --parent-dir)")
    attachment = Attachment(
        boot=records.boot_id(),
        namespace=records.mount_namespace(),
        image=wish.path,
        key=key,
        read_only=wish.read_only,
        kept=wish.kept,
        way=way,
        started=time.time(),
    )
    attachment.save()
    try:
        if wish.snapshot:
            _make_overlay(attachment, wish.format)
        name = _UNSAFE.sub("_", Path(wish.path).stem).lstrip(".") or "disk"
        socket = attachment.directory / "socket"
        wanted = Wanted(
            path=attachment.overlay or wish.path,
            format=None if wish.snapshot else wish.format,
            parent_search=[os.path.abspath(each) for each in wish.parent_search],
            read_only=wish.read_only,
            name=name,
            socket=os.fspath(socket),
            result=os.fspath(attachment.directory / "result"),
        )
        started = _ask_server(attachment, wanted, wish.cancel)
        attachment.size, attachment.sector_size = started.size, started.sector_size
        ways.of(attachment).attach(attachment, socket, name, wish.cancel)
        attachment.state = State.ATTACHED
        attachment.save()
    except BaseException:
        undo(attachment)
        raise
    return attachment


def _make_overlay(attachment: Attachment, format: str | None) -> None:
    """Makes the differencing image beside the image, which takes the changes."""
    source = Path(attachment.image)
    stem = source.stem if source.suffix == ".vhdx" else source.name
    overlay = source.with_name(f"{stem}.mounted.vhdx")
    with image.open(source, format=format) as disk:
        if disk.format != "vhdx":
            raise InvalidArgumentError(
                f"--snapshot needs a VHDX, and this is {disk.format}",
                path=source,
                hint="convert it to VHDX first",
            )
    exists = ExistsError(
        "it has the changes of a mount with --snapshot that was not ended",
        path=overlay,
        hint="vhdx merge --keep-parent-name keeps them, rm throws them away",
    )
    if os.path.lexists(overlay):
        raise exists
    if source.stat().st_nlink > 1:
        raise UnsupportedError(
            "it has another hard link, so changes could not be merged into it later",
            path=source,
            hint="mount a copy, or remove the other name",
        )
    attachment.overlay = os.fspath(overlay)
    attachment.save()  # if this process is killed now, the next command removes it
    try:
        image.create(overlay, parent=source)
    except ExistsError as error:
        attachment.overlay = None
        attachment.save()
        raise exists from error


def undo(attachment: Attachment) -> None:
    """Removes an attachment of which nothing was mounted; its differencing image is empty."""
    with contextlib.suppress(VhdxError):
        detach_image(attachment)
        if attachment.overlay is not None:
            Path(attachment.overlay).unlink(missing_ok=True)
        attachment.remove()


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


@contextlib.contextmanager
def scratch(attachment: Attachment) -> Iterator[Path]:
    """An empty directory of the attachment."""
    path = attachment.directory / f"try-{secrets.token_hex(2)}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        path.rmdir()


def key_of(path: StrPath) -> tuple[int, int]:
    """Device and inode of an image.

    Raises:
        NotFoundError, HostIOError: it cannot be found.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        kind = NotFoundError if isinstance(error, FileNotFoundError) else HostIOError
        raise kind(f"it cannot be found: {error.strerror}", path=os.fsdecode(path)) from error
    return status.st_dev, status.st_ino


def current(key: tuple[int, int]) -> Attachment | None:
    """The attachment of an image, after what serves nothing any more was removed."""
    attachment = records.load(key)
    if attachment is None:
        return None
    check_here(attachment)
    if not attachment.in_use:
        recover(attachment)
        return None
    problem = check_alive(attachment)
    if problem is not None:
        raise InUseError(
            f"it is attached, but {problem}", path=attachment.image, hint=attachment.way_out
        )
    return attachment


def check_same(attachment: Attachment, *, read_only: bool, snapshot: bool) -> None:
    """Refuses to share an attachment that was made in another way.

    Raises:
        InUseError: it differs in ``read_only`` or ``snapshot``.
    """
    if attachment.read_only != read_only:
        mode = "read-only" if attachment.read_only else "for writing"
        raise InUseError(
            f"it is attached {mode}",
            path=attachment.image,
            hint="unmount it first, or mount it in the same way",
        )
    if snapshot != (attachment.overlay is not None):
        raise InUseError(
            "it is attached " + ("without" if snapshot else "with") + " --snapshot",
            path=attachment.image,
            hint="unmount it first, or mount it in the same way",
        )


class Wish(NamedTuple):
    """How an image is to be attached; see :func:`vhdx.mounting.mount`."""

    path: str
    read_only: bool
    kept: bool
    via: str | None
    snapshot: bool
    format: str | None
    parent_search: list[str]
    cancel: Cancel | None


@contextlib.contextmanager
def attached(key: tuple[int, int], wish: Wish) -> Iterator[Attachment]:
    """An attachment of an image, new or shared; if the block fails, a new one is undone.

    The caller holds the lock.

    Raises:
        VhdxError: the image cannot be attached, or is attached in another way.
    """
    attachment = current(key)
    fresh = attachment is None
    if attachment is None:
        attachment = attach_image(key, wish)
    else:
        check_same(attachment, read_only=wish.read_only, snapshot=wish.snapshot)
    try:
        yield attachment
    except BaseException:
        if fresh:
            undo(attachment)
        raise
