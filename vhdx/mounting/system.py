# SPDX-License-Identifier: MIT
"""What the kernel says about mounts, loop devices and nbd devices (proc(5), sysfs(5))."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from vhdx.errors import HostIOError, UnsupportedError
from vhdx.mounting.programs import load_module, run, wait_until

__all__ = [
    "MountPoint",
    "attach_loop",
    "detach_loop",
    "directories_of",
    "disk_of",
    "holders",
    "is_busy",
    "loop_is_attached",
    "loops_of",
    "mounted_at",
    "mounts",
    "remove_directory",
    "sync_device",
    "sync_filesystem",
]

_ESCAPED = re.compile(r"\\([0-7]{3})")
_DETACH_SECONDS = 10.0


class MountPoint(NamedTuple):
    """A line of /proc/self/mountinfo: directory and source."""

    directory: str
    source: str


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def mounts() -> list[MountPoint]:
    """All mounts of this mount namespace, in the order in which they were made."""
    found = []
    text = Path("/proc/self/mountinfo").read_bytes().decode(errors="surrogateescape")
    for line in text.split("\n")[:-1]:
        first, _, rest = line.partition(" - ")
        fields, others = first.split(" "), rest.split(" ")
        found.append(MountPoint(_plain(fields[4]), _plain(others[1])))
    return found


def disk_of(device: str) -> str:
    """The disk that a partition belongs to; any other path as it is."""
    if Path(device).parent != Path("/dev") or not Path(device).is_block_device():
        return device
    entry = Path(os.path.realpath(Path("/sys/class/block", Path(device).name)))
    return f"/dev/{entry.parent.name}" if (entry / "partition").exists() else device


def mounted_at(directory: str) -> MountPoint | None:
    """The topmost mount on a directory, or None."""
    found = [each for each in mounts() if each.directory == directory]
    return found[-1] if found else None


def directories_of(device: str) -> list[str]:
    """Where a block device is mounted."""
    return [each.directory for each in mounts() if each.source == device]


def holders(directory: str) -> list[str]:
    """Processes that use the file system that is mounted on a directory: names and numbers."""
    try:
        device = os.stat(directory).st_dev
    except OSError:
        return []
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            used = [process / "cwd", process / "root", process / "exe", *(process / "fd").iterdir()]
            if any(_is_on(path, device) for path in used):
                name = (process / "comm").read_text(errors="replace").strip()
                found.append(f"{name} ({process.name})")
    return found


def _is_on(path: Path, device: int) -> bool:
    try:
        return path.stat().st_dev == device
    except OSError:
        return False


# ---- loop devices ----


def attach_loop(path: str, *, offset: int, length: int, sector_size: int, read_only: bool) -> str:
    """Attaches a loop device to a range of a file or of a device; returns its path.

    It does direct I/O, so that data is not kept twice in memory and copied twice.

    Raises:
        UnsupportedError: the kernel has no loop devices.
        HostIOError: losetup failed.
    """
    if not Path("/dev/loop-control").exists() and not load_module("loop"):
        raise UnsupportedError(
            "there are no loop devices (/dev/loop-control)",
            hint="modprobe loop; in a container, give it the loop devices of the host",
        )
    arguments = ["--find", "--show", f"--offset={offset}", f"--sizelimit={length}"]
    arguments += ["--direct-io=on", *(["--read-only"] if read_only else [])]
    done = run("losetup", *arguments, f"--sector-size={sector_size}", path)
    if done.code != 0:
        raise HostIOError(f"no loop device could be attached: {done.complaint}", path=path)
    return done.out.strip()


def loops_of(view: str) -> list[str]:
    """The loop devices that are attached to a file."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if entry.read_text().strip().removesuffix(" (deleted)") == view:
                found.append(f"/dev/{entry.parents[1].name}")
    return found


def remove_directory(path: Path) -> None:
    """Removes a directory with all in it, but nothing that is mounted there."""
    inside = [each.directory for each in mounts() if Path(each.directory).is_relative_to(path)]
    for directory in reversed(inside):
        run("umount", "--lazy", directory)
    if not any(Path(each.directory).is_relative_to(path) for each in mounts()):
        shutil.rmtree(path, ignore_errors=True)


def loop_is_attached(device: str) -> bool:
    """Whether a loop device has a file."""
    return Path("/sys/block", Path(device).name, "loop/backing_file").exists()


def detach_loop(device: str) -> bool:
    """Detaches a loop device; returns False if it stays, because something still uses it."""
    if not loop_is_attached(device):
        return True
    run("losetup", "--detach", device)
    return wait_until(lambda: not loop_is_attached(device), _DETACH_SECONDS)


def is_busy(device: str) -> bool:
    """Whether a block device is mounted or claimed, such as by LVM or a RAID."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


# ---- writing back ----


def sync_device(device: str) -> str | None:
    """Writes back what the kernel holds of a block device; returns the failure, or None."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{device} could not be written back: {error.strerror}"
    return None


def sync_filesystem(directory: str) -> str | None:
    """Writes back a mounted file system (syncfs(2)); returns the failure, or None."""
    done = run("sync", "-f", directory, seconds=3600)
    return None if done.code == 0 else f"{directory} could not be written back: {done.complaint}"
