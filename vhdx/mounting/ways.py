# SPDX-License-Identifier: MIT
"""Ways to show a served disk to the kernel: its own NBD client, or FUSE with loop devices.

``nbd``: nbd-client does the handshake and hands the socket to the kernel by netlink. Partitions are
partitions of /dev/nbdN. ``fuse``: nbdfuse shows the disk as a file, and a loop device is attached
to the whole file or to the range of a partition. The first way has fewer copies, and the second
needs no kernel module beyond fuse and loop.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vhdx.errors import HostIOError, InvalidArgumentError, UnsupportedError, VhdxError
from vhdx.mounting import system
from vhdx.mounting.programs import has, last_line, load_module, run, spawn, wait_until
from vhdx.mounting.records import Device

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhdx.mounting.partitions import Partition
    from vhdx.mounting.records import Attachment

__all__ = ["WAYS", "Way", "attach_loop", "choose", "of"]

_CONNECTIONS = 4
_ATTACH_SECONDS = 30.0
_DETACH_SECONDS = 30.0
_CONNECTED = re.compile(r"/dev/nbd\d+")


class Way(Protocol):
    """What each way can do; the caller saves the record after each call."""

    def missing(self) -> str | None:
        """What keeps this machine from using it; None if nothing does."""

    def attach(
        self, attachment: Attachment, socket: Path, export: str, cancel: Callable[[], bool] | None
    ) -> None:
        """Shows the disk to the kernel, and sets ``view`` of the attachment."""

    def device(self, attachment: Attachment, partition: Partition | None) -> Device:
        """A block device for a partition, or for the whole disk."""

    def detach(self, attachment: Attachment) -> list[str]:
        """Takes the disk away from the kernel; returns what went wrong."""

    def problem(self, attachment: Attachment) -> str | None:
        """Why the kernel does not reach the disk; None if it does."""


def attach_loop(attachment: Attachment, partition: Partition | None, *, read_only: bool) -> str:
    """Attaches a loop device to the view, or to the range of a partition; returns its path."""
    assert attachment.view is not None
    return system.attach_loop(
        attachment.view,
        offset=0 if partition is None else partition.offset,
        length=attachment.size if partition is None else partition.length,
        sector_size=attachment.sector_size,
        read_only=read_only,
    )


def _loop(attachment: Attachment, partition: Partition | None) -> Device:
    path = attach_loop(attachment, partition, read_only=attachment.read_only)
    return _device(path, attachment, partition, loop=True)


def _device(path: str, attachment: Attachment, partition: Partition | None, *, loop: bool) -> Device:
    if partition is None:
        return Device(path, None, loop, 0, attachment.size)
    return Device(path, partition.number, loop, partition.offset, partition.length)


class _Fuse:
    def missing(self) -> str | None:
        if not has("nbdfuse"):
            return "nbdfuse is not installed (apt install libnbd-bin)"
        if not has("fusermount3"):
            return "fusermount3 is not installed (apt install fuse3)"
        if not Path("/dev/fuse").exists() and not load_module("fuse"):
            return "the kernel has no FUSE (/dev/fuse)"
        if not Path("/dev/loop-control").exists() and not load_module("loop"):
            return "the kernel has no loop devices (/dev/loop-control)"
        return None

    def attach(
        self,
        attachment: Attachment,
        socket: Path,
        export: str,
        cancel: Callable[[], bool] | None,
    ) -> None:
        mountpoint, ready = attachment.directory / "fuse", attachment.directory / "fuse.pid"
        del export  # the server has one
        mountpoint.mkdir(mode=0o700, exist_ok=True)
        log = attachment.directory / "fuse.log"
        with Path(os.devnull).open("w") as nowhere:
            fuse = spawn(
                [
                    "nbdfuse",
                    *(["--readonly"] if attachment.read_only else []),
                    f"--connections={_CONNECTIONS}",
                    f"--pidfile={ready}",
                    f"{mountpoint}/{attachment.view_name}",
                    "--unix",
                    os.fspath(socket),
                ],
                output=nowhere.fileno(),
                errors=log,
                remember=attachment.remember_fuse,
            )
        attachment.view = os.fspath(mountpoint / attachment.view_name)
        attachment.save()
        wait_until(lambda: ready.exists() or not fuse.alive, _ATTACH_SECONDS, cancel)
        if not ready.exists():
            raise HostIOError(f"nbdfuse cannot show the disk: {last_line(log) or 'no answer'}")

    def device(self, attachment: Attachment, partition: Partition | None) -> Device:
        return _loop(attachment, partition)

    def detach(self, attachment: Attachment) -> list[str]:
        problems = []
        mountpoint, process = os.fspath(attachment.directory / "fuse"), attachment.fuse
        if system.mounted_at(mountpoint) is not None:
            done = run("fusermount3", "-u", mountpoint)
            if done.code != 0:
                problems.append(f"the FUSE mount stays: {done.complaint}")
                run("umount", "--lazy", mountpoint)
        elif process is not None:
            process.signal(signal.SIGTERM)  # it was about to mount
        if process is not None and not wait_until(lambda: not process.alive, _DETACH_SECONDS):
            problems.append("nbdfuse did not end")
            process.end(5.0)
        if system.mounted_at(mountpoint) is not None:  # it was killed, or just mounted
            run("umount", "--lazy", mountpoint)
        attachment.fuse, attachment.view = None, None
        return problems

    def problem(self, attachment: Attachment) -> str | None:
        if attachment.fuse is not None and not attachment.fuse.alive:
            return "nbdfuse has died"
        mountpoint = os.fspath(attachment.directory / "fuse")
        if attachment.view is not None and system.mounted_at(mountpoint) is None:
            return "the FUSE mount is gone"
        return None


class _Nbd:
    def missing(self) -> str | None:
        if not load_module("nbd"):
            return "the kernel has no nbd module"
        if not has("nbd-client"):
            return "nbd-client is not installed (apt install nbd-client)"
        return None

    def attach(
        self,
        attachment: Attachment,
        socket: Path,
        export: str,
        cancel: Callable[[], bool] | None,
    ) -> None:
        done = run(
            "nbd-client",
            "-unix",
            os.fspath(socket),
            "-name",
            export,
            "-block-size",
            str(attachment.sector_size),
            "-connections",
            str(_CONNECTIONS),
            *(["-readonly"] if attachment.read_only else []),
        )
        found = _CONNECTED.search(done.out + done.err)
        if done.code != 0 or found is None:
            raise HostIOError(
                f"nbd-client cannot attach the disk: {done.complaint}", hint="try --via fuse"
            )
        attachment.view = found[0]
        attachment.save()
        if not wait_until(lambda: _sectors_of(found[0]) > 0, _ATTACH_SECONDS, cancel):
            raise HostIOError("the kernel does not see the disk", path=found[0])

    def device(self, attachment: Attachment, partition: Partition | None) -> Device:
        assert attachment.view is not None
        if partition is None:
            return _device(attachment.view, attachment, None, loop=False)
        node = self._partition(attachment.view, partition)
        if node is None:  # the kernel may have looked before the sockets were ready
            run("blockdev", "--rereadpt", attachment.view)
            wait_until(lambda: self._partition(attachment.view or "", partition) is not None, 2.0)
            node = self._partition(attachment.view, partition)
        if node is None:  # the module was loaded with max_part=0, or knows no such table
            return _loop(attachment, partition)
        return _device(node, attachment, partition, loop=False)

    def _partition(self, view: str, partition: Partition) -> str | None:
        """The node of a partition that begins and ends where it must; sysfs counts 512 bytes."""
        node = f"{view}p{partition.number}"
        entry = Path("/sys/block", Path(view).name, Path(node).name)
        try:
            start = int((entry / "start").read_text()) * 512
            length = int((entry / "size").read_text()) * 512
        except OSError:
            return None
        right = (start, length) == (partition.offset, partition.length)
        return node if right and Path(node).exists() else None

    def detach(self, attachment: Attachment) -> list[str]:
        view = attachment.view
        if view is None:
            return []
        problems = []
        try:
            run("nbd-client", "-d", view)
        except VhdxError as error:
            problems.append(str(error))
        if not wait_until(lambda: _sectors_of(view) == 0, _DETACH_SECONDS):
            problems.append(f"{view} stays attached")
        attachment.view = None
        return problems

    def problem(self, attachment: Attachment) -> str | None:
        if attachment.view is not None and _sectors_of(attachment.view) == 0:
            return "the kernel has no connection any more"
        return None


def _sectors_of(device: str) -> int:
    """The size of an nbd device; 0 if it is not connected, or not there."""
    try:
        return int(Path("/sys/block", Path(device).name, "size").read_text())
    except (OSError, ValueError):
        return 0


WAYS: dict[str, Way] = {"nbd": _Nbd(), "fuse": _Fuse()}
"""The ways by name, best first."""


def of(attachment: Attachment) -> Way:
    """The way in which an image is attached."""
    return WAYS[attachment.way]


def choose(wanted: str | None) -> str:
    """The best way that this machine has, or the wanted one.

    Raises:
        InvalidArgumentError: there is no such way.
        UnsupportedError: the machine has none; the message says what each needs.
    """
    if wanted is not None and wanted not in WAYS:
        raise InvalidArgumentError(f"there is no way {wanted!r}", hint=f"choose {' or '.join(WAYS)}")
    missing = []
    for name, way in WAYS.items():
        if wanted in {None, name}:
            lack = way.missing()
            if lack is None:
                return name
            missing.append(f"{name}: {lack}")
    raise UnsupportedError("images cannot be attached here: " + "; ".join(missing))
