# SPDX-License-Identifier: MIT
"""What is attached and mounted: one record for each image, kept until the image is detached.

Records are in ``/run/vhdx/mounts`` and not in a user's runtime directory, because mounts belong to
the machine. An image is found by its device and inode, so every name of a file leads to the same
record. A command holds the lock of an image while it changes anything. The kernel releases the lock
when the command has ended, and the programs that it ran, except those that leave a daemon.

A record is JSON, replaced as a whole. Its state only moves forward, and is written before what it
announces. So if the lock is free, then in the state *attaching* nothing was ever mounted, and in the
state *detaching* something may have been, and is to be detached. Recovery: after a restart of the
machine nothing is mounted, so a record with another boot id is void. A record that cannot be read is
reported, never guessed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vhdx.errors import HostIOError, InUseError, VhdxError
from vhdx.mounting import system
from vhdx.mounting.programs import Process, keeping, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "DIRECTORY",
    "VERSION",
    "Attachment",
    "Device",
    "Mount",
    "State",
    "boot_id",
    "is_locked",
    "load",
    "load_all",
    "locked",
    "mount_namespace",
    "was_begun",
]

DIRECTORY = Path("/run/vhdx/mounts")
VERSION = 1
_LOCK_SECONDS = 20.0


class State(StrEnum):
    """What a record describes."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"
    DETACHED = "detached"
    """Only the differencing image of a snapshot is left."""


class Device(msgspec.Struct, frozen=True):
    """A block device of an attached image.

    Attributes:
        path: such as /dev/loop3.
        partition: the number of the partition; None for the whole disk.
        loop: whether it is a loop device that must be detached.
        offset, length: what it shows of the disk, bytes.
    """

    path: str
    partition: int | None
    loop: bool
    offset: int
    length: int


class Mount(msgspec.Struct, frozen=True):
    """A mounted file system.

    Attributes:
        directory: where it is mounted.
        device: what is mounted.
        filesystem: its type, as mount(8) names it.
        read_only: whether it was mounted read-only.
    """

    directory: str
    device: Device
    filesystem: str
    read_only: bool

    @property
    def directories(self) -> list[str]:
        """Where it is mounted now: somewhere else if the directory was renamed, or nowhere."""
        found = system.directories_of(self.device.path)
        return [self.directory] if self.directory in found else found


class Attachment(msgspec.Struct, kw_only=True):
    """An attached image.

    Attributes:
        version: of the record.
        boot: identifies the boot of the machine.
        namespace: inode of the mount namespace in which it is attached.
        image: the path that the user named, absolute.
        key: device and inode of the image.
        overlay: the differencing image that takes the changes (``--snapshot``), or None.
        read_only: whether the image is served read-only.
        kept: attached by ``vhdx attach``, so that it stays when nothing is mounted any more.
        way: "nbd" or "fuse".
        state: how far it came.
        started: seconds since 1970.
        size, sector_size: of the disk, bytes.
        server: serves the image on a private socket.
        fuse: shows the disk as a file; None with the way "nbd".
        view: that file, or the nbd device; None until it is there.
        devices: block devices, those of mounts included.
        mounts: mounted file systems.
        problems: why bytes may be missing from the image, as far as it was found out.
    """

    version: int = VERSION
    boot: str
    namespace: int
    image: str
    key: tuple[int, int]
    overlay: str | None = None
    read_only: bool
    kept: bool
    way: str
    state: State = State.ATTACHING
    started: float
    size: int = 0
    sector_size: int = 512
    server: Process | None = None
    fuse: Process | None = None
    view: str | None = None
    devices: list[Device] = []
    mounts: list[Mount] = []
    problems: list[str] = []

    @property
    def in_use(self) -> bool:
        """Whether it serves something; otherwise a command was killed, or umount(8) was used."""
        if self.state is not State.ATTACHED:
            return False
        return self.kept or any(each.directories for each in self.mounts)

    @property
    def way_out(self) -> str:
        """The command that ends it."""
        word = "" if self.overlay is None else " --discard (or --commit)"
        if self.mounts:
            return f"vhdx umount {self.mounts[0].directory}{word}"
        return f"vhdx {'detach' if self.kept else 'umount'} {self.image}{word}"

    @property
    def is_here(self) -> bool:
        """Whether it was attached in the mount namespace of this process."""
        return self.namespace == mount_namespace()

    @property
    def view_name(self) -> str:
        """The name of the file that shows the disk; it tells the loop devices of images apart."""
        return self.directory.name

    @property
    def directory(self) -> Path:
        """Holds what belongs to the attachment: record, socket, log and FUSE mount point."""
        return directory_of(self.key)

    def save(self) -> None:
        """Writes the record; the caller holds the lock."""
        data = json.dumps(msgspec.to_builtins(self)).encode()  # paths may not be valid UTF-8
        path = _record_of(self.key)
        new = path.with_suffix(".new")
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            new.write_bytes(data)
            new.replace(path)
        except OSError as error:
            raise HostIOError(f"it cannot be written: {error.strerror}", path=path) from error

    def remember_server(self, process: Process) -> None:
        """Records the server."""
        self.server = process
        self.save()

    def remember_fuse(self, process: Process) -> None:
        """Records the process that shows the disk as a file."""
        self.fuse = process
        self.save()

    def remove(self) -> None:
        """Removes the record and its directory; nothing is attached any more."""
        system.remove_directory(self.directory)


def boot_id() -> str:
    """Identifies this boot of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def mount_namespace() -> int:
    """The inode of the mount namespace of this process."""
    return os.stat("/proc/self/ns/mnt").st_ino


def directory_of(key: tuple[int, int]) -> Path:
    """The directory of the record of an image."""
    return DIRECTORY / f"{key[0]:x}-{key[1]:x}"


def load(key: tuple[int, int]) -> Attachment | None:
    """The record of an image, or None.

    Raises:
        HostIOError: there is one, but it cannot be understood.
    """
    return _load(_record_of(key))


def was_begun(key: tuple[int, int]) -> bool:
    """Whether a command works on an image, or was killed before it wrote a record."""
    return _lock_of(key).exists()


def _record_of(key: tuple[int, int]) -> Path:
    return directory_of(key) / "record.json"


def _load(path: Path) -> Attachment | None:
    try:
        found = msgspec.convert(json.loads(path.read_bytes()), Attachment)
        if found.version != VERSION:
            raise ValueError(f"it has the version {found.version}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise HostIOError(
            f"the record of a mount cannot be read: {error}",
            path=path,
            hint="another version of vhdx may have written it; look what is mounted (findmnt, "
            f"losetup), undo that by hand and remove {path.parent}",
        ) from error
    return found if found.boot == boot_id() else None  # else the machine was started anew


def load_all(unreadable: list[VhdxError] | None = None) -> list[Attachment]:
    """All records that can be read, oldest first; a command may be changing one of them meanwhile.

    Args:
        unreadable: gets an error for each of the others.
    """
    found = []
    for path in DIRECTORY.glob("*/record.json"):
        try:
            attachment = _load(path)
        except VhdxError as error:
            if unreadable is not None:
                unreadable.append(error)
            continue
        if attachment is not None:
            found.append(attachment)
    return sorted(found, key=lambda each: each.started)


def is_locked(key: tuple[int, int]) -> bool:
    """Whether a command is working on this image."""
    try:
        fd = os.open(_lock_of(key), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock_of(key: tuple[int, int]) -> Path:
    return directory_of(key).with_suffix(".lock")


@contextlib.contextmanager
def locked(key: tuple[int, int], cancel: Callable[[], bool] | None = None) -> Iterator[None]:
    """Holds the lock of an image.

    Raises:
        InUseError: another command has it for long.
    """
    path = _lock_of(key)
    try:
        DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostIOError(f"it cannot be created: {error.strerror}", path=DIRECTORY) from error
    held: list[int] = []

    def take() -> bool:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                held.append(fd)
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        finally:
            if not held:
                os.close(fd)
        return False  # somebody has it, or removed it before we had it

    if not wait_until(take, _LOCK_SECONDS, cancel):
        raise InUseError("another vhdx command is mounting or unmounting it", path=path)
    try:
        with contextlib.suppress(HostIOError):
            if load(key) is None:  # void, or a command was killed very early, or very late
                system.remove_directory(directory_of(key))
        with keeping(held[0]):
            yield
    finally:
        path.unlink(missing_ok=True)
        os.close(held[0])
