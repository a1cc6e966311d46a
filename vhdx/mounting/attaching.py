# SPDX-License-Identifier: MIT
"""Attaches images: a private server, then one of the ways to show its disk to the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from vhdx import image, place
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
from vhdx.mounting import records, ways
from vhdx.mounting.detaching import check_alive, check_here, recover, undo
from vhdx.mounting.messages import Started, Wanted
from vhdx.mounting.programs import last_line, spawn
from vhdx.mounting.records import Attachment, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vhdx.interrupts import Cancel

    StrPath = str | os.PathLike[str]

__all__ = ["Wish", "attached", "key_of", "require_root"]

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")


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


def key_of(path: StrPath) -> tuple[int, int]:
    """Device and inode of an image; of a block device its number, which all of its nodes have.

    Raises:
        NotFoundError, HostIOError: it cannot be found.
    """
    try:
        return place.of(path).key(place.spelled(path))
    except OSError as error:
        kind = NotFoundError if isinstance(error, FileNotFoundError) else HostIOError
        raise kind(f"it cannot be found: {error.strerror}", path=os.fsdecode(path)) from error


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
