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
from typing import TYPE_CHECKING

import msgspec

from vhdx import control, image
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    VhdxError,
)
from vhdx.mounting import records, system, ways
from vhdx.mounting.messages import Result, Started, Wanted
from vhdx.mounting.programs import spawn, wait_until
from vhdx.mounting.records import Attachment, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vhdx.interrupts import Cancel

    StrPath = str | os.PathLike[str]

__all__ = [
    "attach_image",
    "check_alive",
    "check_same",
    "check_writes",
    "current",
    "detach_image",
    "drop_overlay",
    "key_of",
    "report_problems",
    "require_root",
    "scratch",
]

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
_CLOSE_SECONDS = 120.0


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
        log = (attachment.directory / "server.log").read_text(errors="replace").strip()
        raise HostIOError(f"the server ended: {log.splitlines()[-1] if log else 'it was killed'}")
    started = msgspec.convert(json.loads(text), Started)
    if started.error is not None:
        raise started.error.exception()
    return started


def attach_image(
    path: str,
    key: tuple[int, int],
    *,
    read_only: bool,
    kept: bool,
    via: str | None,
    snapshot: bool,
    format: str | None,
    parent_search: Sequence[str],
    cancel: Cancel | None,
) -> Attachment:
    """Attaches an image; the caller holds its lock. If it fails, nothing stays.

    Raises:
        VhdxError: the image cannot be opened, or the machine cannot attach it.
    """
    way = ways.choose(via)
    attachment = Attachment(
        boot=records.boot_id(),
        image=path,
        key=key,
        read_only=read_only,
        kept=kept,
        way=way,
        started=time.time(),
    )
    attachment.save()
    try:
        if snapshot:
            attachment.overlay = _make_overlay(path, format, parent_search)
            attachment.save()
        name = _UNSAFE.sub("_", Path(path).stem) or "disk"
        socket = attachment.directory / "socket"
        wanted = Wanted(
            path=attachment.overlay or path,
            format=None if snapshot else format,
            parent_search=[os.path.abspath(each) for each in parent_search],
            read_only=read_only,
            name=name,
            socket=os.fspath(socket),
            result=os.fspath(attachment.directory / "result"),
        )
        started = _ask_server(attachment, wanted, cancel)
        attachment.size, attachment.sector_size = started.size, started.sector_size
        ways.of(attachment).attach(attachment, socket, name, cancel)
        attachment.state = State.ATTACHED
        attachment.save()
    except BaseException:
        with contextlib.suppress(VhdxError):
            detach_image(attachment)
        if attachment.overlay is not None:
            Path(attachment.overlay).unlink(missing_ok=True)
        raise
    return attachment


def _make_overlay(path: str, format: str | None, parent_search: Sequence[str]) -> str:
    """A differencing image beside the image, which takes the changes."""
    source = Path(path)
    overlay = source.with_name(f"{source.stem}.mounted.vhdx")
    with image.open(path, format=format, parent_search=parent_search) as disk:
        if disk.format != "vhdx":
            raise InvalidArgumentError(
                f"--snapshot needs a VHDX, and this is {disk.format}",
                path=path,
                hint="convert it to VHDX first",
            )
    try:
        image.create(overlay, parent=path)
    except ExistsError as error:
        raise ExistsError(
            "it has the changes of a mount with --snapshot that was not ended",
            path=overlay,
            hint="vhdx merge keeps them (see docs/mounting.md), rm throws them away",
        ) from error
    return os.fspath(overlay)


def check_alive(attachment: Attachment) -> str | None:
    """What is wrong with an attached image; None if nothing is."""
    if attachment.server is None or not attachment.server.alive:
        return "its server has died"
    return ways.of(attachment).problem(attachment)


def check_writes(attachment: Attachment) -> list[str]:
    """Asks the server how many writes failed; for an image that stays attached."""
    assert attachment.server is not None
    for each in control.servers(everywhere=True):
        if each.pid == attachment.server.pid:
            return _failed(attachment, sum(one.failed_writes for one in each.connections))
    return ["the server does not answer"]


def _failed(attachment: Attachment, count: int) -> list[str]:
    if count == 0 or attachment.read_only:
        return []
    log = (attachment.directory / "server.log").read_text(errors="replace").strip()
    why = f": {log.splitlines()[-1]}" if log else ""
    return [f"{count} writes of the kernel failed (a full disk, or an I/O error){why}"]


def detach_image(attachment: Attachment) -> list[str]:
    """Detaches an image; the caller holds its lock. Returns what kept bytes from the image.

    It goes on after a failure, so that as little as possible stays behind.

    Raises:
        InUseError: a device is still in use; the image stays attached.
    """
    used = {each.path for each in attachment.devices} | {attachment.view or ""}
    busy = sorted(each for each in used if each.startswith("/dev/") and system.is_busy(each))
    if busy and check_alive(attachment) is None:
        raise InUseError(
            f"{', '.join(busy)} is in use (mounted, or claimed by LVM, a RAID or cryptsetup)",
            path=attachment.image,
            hint="findmnt and lsblk show by what",
        )
    attachment.state = State.DETACHING
    attachment.save()
    problems = _release(attachment)
    problems += ways.of(attachment).detach(attachment)
    problems += _stop_server(attachment)
    attachment.remove()
    return problems if not attachment.read_only else []


def _release(attachment: Attachment) -> list[str]:
    """Writes back and detaches the devices."""
    problems = []
    for device in attachment.devices:
        if not attachment.read_only:
            problem = system.sync_device(device.path)
            problems += [] if problem is None else [problem]
        if device.loop and not system.detach_loop(device.path):
            problems.append(f"{device.path} stays attached until what uses it ends")
    attachment.devices = []
    return problems


def _stop_server(attachment: Attachment) -> list[str]:
    """Ends the server, and reads what became of the image."""
    server = attachment.server
    if server is None:
        return []
    server.signal(signal.SIGTERM)
    if not wait_until(lambda: not server.alive, _CLOSE_SECONDS):
        server.end(0.0)
    path = attachment.directory / "result"
    try:
        result = msgspec.convert(json.loads(path.read_bytes()), Result)
    except FileNotFoundError:
        return ["the server was killed, so what was not synced may be missing"]
    except ValueError as error:
        return [f"what the server says cannot be understood: {error}"]
    problems = _failed(attachment, result.failed_writes)
    if result.error is not None:
        problems.append(f"the image could not be closed: {result.error}")
    return problems


def recover(attachment: Attachment) -> list[str]:
    """Removes what a killed command left half-made; the caller holds the lock.

    Returns:
        What kept bytes from the image.

    Raises:
        InUseError: it is mounted.
    """
    mounted = [path for each in attachment.mounts for path in each.directories]
    if mounted:
        raise InUseError(
            f"it is mounted on {mounted[0]}, and a command was killed while {attachment.state.value}",
            path=attachment.image,
            hint=f"vhdx umount {mounted[0]}",
        )
    unused = not attachment.mounts and attachment.state is not State.DETACHING
    problems = detach_image(attachment)
    if unused:
        drop_overlay(attachment)  # nothing was mounted, so it is empty
    return [] if unused else problems


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
    """The attachment of an image, after what a killed command left was removed."""
    attachment = records.load(key)
    if attachment is None:
        return None
    if not attachment.is_whole:
        report_problems(attachment, recover(attachment), kept_overlay=True)
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
        InUseError: it is read-only, or differs in ``snapshot``.
    """
    if attachment.read_only and not read_only:
        raise InUseError(
            "it is attached read-only",
            path=attachment.image,
            hint="mount it with --read-only, or unmount it first",
        )
    if snapshot != (attachment.overlay is not None):
        raise InUseError(
            "it is attached " + ("without" if snapshot else "with") + " --snapshot",
            path=attachment.image,
            hint="mount it in the same way, or unmount it first",
        )


def drop_overlay(attachment: Attachment) -> None:
    """Removes the differencing image of a mount that failed."""
    if attachment.overlay is not None:
        Path(attachment.overlay).unlink(missing_ok=True)


def report_problems(attachment: Attachment, problems: list[str], *, kept_overlay: bool) -> None:
    """Reports what kept bytes from an image that is unmounted.

    Raises:
        HostIOError: there are such problems.
    """
    if not problems or attachment.read_only:
        return
    hint = "what was synced before is there; check the file system the next time"
    if attachment.overlay is not None and kept_overlay:
        hint = f"the changes are in {attachment.overlay}: check them, then merge or remove it"
    raise HostIOError(
        "it is unmounted, but not everything may be in the image: " + "; ".join(problems),
        path=attachment.image,
        hint=hint,
    )
