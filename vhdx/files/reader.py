# SPDX-License-Identifier: MIT
"""Reads files of an image with dissect: ``python -m vhdx.files.reader JSON``.

It writes lines of JSON, or the content of a file, to standard output, and an error as one line of
JSON to standard error. The disk is opened for reading as every disk is, with its locks and parents.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import signal
import stat
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vhdx import image
from vhdx.control.api import ErrorReport
from vhdx.errors import InvalidArgumentError, NotFoundError, UnsupportedError, VhdxError
from vhdx.files.copying import Copy, children
from vhdx.files.messages import FileEntry, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from vhdx.image.disk import Disk

__all__ = ["main"]

_MOST_MEMORY = 2 << 30
_PIECE = 1 << 20
_MOST_LINKS = 40
_NOT_ON_DISKS = {"zip", "tar", "vmtar", "cpio", "vbk", "ad1", "ntds"}
_RESERVED = {"c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "e3c9e316-0b5c-4db8-817d-f92df00215ae"}
"""Types of partitions that are not chosen by themselves: EFI, and Microsoft's reserved one."""


class _Stream(io.RawIOBase):
    """A disk as a file that is read."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._at = disk, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._disk.size)[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._disk.size - self._at))
        self._disk.preadinto(memoryview(buffer)[:length], self._at)
        self._at += length
        return length


class _Volume(NamedTuple):
    name: str
    file: BinaryIO
    reserved: bool


def _volumes(whole: BinaryIO) -> Iterator[_Volume]:
    """Partitions and logical volumes; the whole disk as "0" where there is no partition table."""
    from dissect.target import volume
    from dissect.target.exceptions import VolumeSystemError

    try:
        found = volume.open(whole).volumes
    except VolumeSystemError:
        found = []
    if not found:
        yield _Volume("0", whole, False)
    members = []
    for each in found or [whole]:
        if volume.is_lvm_volume(each):
            members.append(each)
        elif each is not whole:
            yield _Volume(str(each.number), each, str(each.type).lower() in _RESERVED)
    for group in volume.open_lvm(members) if members else ():
        for each in group.volumes:
            yield _Volume(str(each.name), each, False)


def _open_filesystem(file: BinaryIO) -> Any:
    """The file system in a volume, or None."""
    from dissect.target import filesystem
    from dissect.target.exceptions import FilesystemError

    try:
        found = filesystem.open(file)
    except FilesystemError:
        return None
    return None if found.__type__ in _NOT_ON_DISKS else found


def _filesystem(whole: BinaryIO, partition: str | None) -> Any:
    """The wanted file system.

    Raises:
        NotFoundError: there is no such partition.
        UnsupportedError: there is no file system that dissect reads.
        InvalidArgumentError: a partition must be chosen.
    """
    if partition == "0":
        found = [("0", _open_filesystem(whole), False)]
    else:
        volumes = list(_volumes(whole))
        if partition is not None and partition not in {each.name for each in volumes}:
            names = ", ".join(each.name for each in volumes if each.name != "0")
            raise NotFoundError(
                f"there is no partition {partition}",
                hint=f"there are {names}" if names else "the disk has no partitions",
            )
        found = [
            (each.name, _open_filesystem(each.file), each.reserved)
            for each in volumes
            if partition in {None, each.name}
        ]
    usable = [each for each in found if each[1] is not None]
    if len(usable) > 1:
        usable = [each for each in usable if not each[2]] or usable
    if len(usable) == 1:
        return usable[0][1]
    if usable:
        names = ", ".join(f"{name} ({filesystem.__type__})" for name, filesystem, _ in usable)
        raise InvalidArgumentError(
            f"it has the partitions {names}", hint="choose one with --partition"
        )
    raise UnsupportedError(
        "no file system was found that can be read without mounting",
        hint="encrypted disks: see docs/mounting.md",
    )


def _described(name: str, entry: Any) -> FileEntry:
    try:
        status = entry.lstat()
    except Exception:
        return FileEntry(name, "other", 0, 0, 0.0)
    kind, target = "other", None
    if stat.S_ISLNK(status.st_mode):
        kind, target = "link", str(entry.readlink())
    elif stat.S_ISDIR(status.st_mode):
        kind = "directory"
    elif stat.S_ISREG(status.st_mode):
        kind = "file"
    mode, size = stat.S_IMODE(int(status.st_mode)), int(status.st_size)
    return FileEntry(name, kind, size, mode, float(status.st_mtime), target)


def _list(entry: Any, out: BinaryIO) -> None:
    for each in children(entry) if entry.is_dir() else [entry]:
        described = _described(each.name, each)
        out.write(json.dumps(msgspec.to_builtins(described)).encode() + b"\n")


def _read(entry: Any, out: BinaryIO) -> None:
    if not entry.is_file():
        raise InvalidArgumentError("it is not a file")
    with entry.open() as file:
        while piece := file.read(_PIECE):
            out.write(piece)


def _find(filesystem: Any, path: str) -> Any:
    """The entry at a path; links are followed.

    Raises:
        VhdxError: links lead in a circle, or out of the file system.
    """
    left = path.split("/")[::-1]
    at: list[str] = []
    links = 0
    while left:
        name = left.pop()
        if name == "..":
            at = at[:-1]
        if name in {"", ".", ".."}:
            continue
        at.append(name)
        entry = filesystem.get("/".join(("", *at)))
        if not entry.is_symlink():
            continue
        target, links = str(entry.readlink()), links + 1
        if links > _MOST_LINKS or ":" in target:
            raise VhdxError(f"it is a link to {target!r}, which cannot be followed")
        at = [] if target.startswith("/") else at[:-1]
        left += target.split("/")[::-1]
    return filesystem.get("/".join(("", *at)))


def _act(wanted: Wanted, out: BinaryIO) -> None:
    with image.open(wanted.image, format=wanted.format, parent_search=wanted.parent_search) as disk:
        whole = io.BufferedReader(_Stream(disk), 1 << 16)
        entry = _find(_filesystem(whole, wanted.partition), wanted.path)
        if wanted.action == "list":
            _list(entry, out)
        elif wanted.action == "read":
            _read(entry, out)
        else:
            Copy(wanted, out).run(entry)


def _report(wanted: Wanted, error: BaseException) -> VhdxError:
    """The failure in our words."""
    from dissect.target import exceptions

    where = f"{wanted.image}:{wanted.path}"
    if isinstance(error, VhdxError):
        error.path = error.path or where
        return error
    if isinstance(error, exceptions.FileNotFoundError | exceptions.NotADirectoryError):
        return NotFoundError("there is no such file", path=where)
    if isinstance(error, MemoryError):
        return VhdxError("it needs too much memory; the file system may be damaged", path=where)
    detail = str(error) or type(error).__name__
    return VhdxError(f"it cannot be read: {detail}", path=where)


def main() -> int:
    """Does what the JSON in the first argument says; returns the exit code."""
    wanted = msgspec.convert(json.loads(sys.argv[1]), Wanted)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is unfinished is removed
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    logging.disable()
    out, errors = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(2), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):  # what the readers print is no answer
        os.dup2(nowhere, fd)
    try:
        _act(wanted, out)
        out.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except ImportError as error:
        failure: VhdxError = UnsupportedError(
            f"files are read with dissect, which is not installed ({error.name})",
            hint="pip install 'vhdx[files]'; or, as root, vhdx mount",
        )
    except Exception as error:
        failure = _report(wanted, error)
    else:
        return 0
    errors.write(json.dumps(msgspec.to_builtins(ErrorReport.of(failure))).encode() + b"\n")
    errors.flush()
    return 1


if __name__ == "__main__":
    code = main()
    sys.stdout = sys.stderr = None
    os._exit(code)
