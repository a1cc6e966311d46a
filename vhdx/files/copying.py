# SPDX-License-Identifier: MIT
"""Copies files and directories of an image to the host.

Names and links come from the image and are hostile. Every directory, link and file of a tree is
created exclusively, below a directory that is new, so nothing is written through a link.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from vhdx.errors import ExistsError, InvalidArgumentError, NotFoundError
from vhdx.files.messages import Copied

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vhdx.files.messages import Wanted

__all__ = ["Copy", "children"]

_PIECE = 1 << 20
_DEEPEST = 200
_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


_NTFS = {
    *("$MFT", "$MFTMirr", "$LogFile", "$Volume", "$AttrDef", "$Bitmap", "$Boot", "$BadClus"),
    *("$Secure", "$UpCase", "$Extend"),
}
"""Metadata that NTFS shows as files in its root directory."""


def children(entry: Any) -> list[Any]:
    """The entries of a directory by name, without those that are no files of the user."""
    found = {each.name: each for each in entry.listdir_ext()}
    hidden = {".", ".."}
    if entry.fs.__type__ == "ntfs" and not entry.path.strip("/"):
        hidden |= _NTFS
    return [found[name] for name in sorted(found) if name not in hidden]


class Copy:
    """A copy of a file or a directory."""

    def __init__(self, wanted: Wanted, out: BinaryIO) -> None:
        """``out`` gets lines of :class:`Copied`."""
        self._wanted, self._out = wanted, out
        self._done = self._total = self._files = 0
        self._failures: list[str] = []

    def run(self, entry: Any) -> None:
        """Copies an entry of a file system.

        Raises:
            InvalidArgumentError: it is a directory, and that was not asked for.
            ExistsError, NotFoundError: the destination exists, or its directory does not.
        """
        directory = entry.is_dir()
        if directory and not self._wanted.recursive:
            raise InvalidArgumentError("it is a directory", hint="--recursive copies directories")
        if not directory and not entry.is_file():
            raise InvalidArgumentError("it is neither a file nor a directory")
        target = self._target(entry.name)
        if directory:
            self._total = _size_of(entry, 0)
            self._tree(entry, target, 0)
        else:
            self._total = int(entry.stat().st_size)
            self._single(entry, target)
        self._tell(self._failures)

    def _target(self, name: str) -> str:
        target = self._wanted.destination
        if os.path.isdir(target):
            if not _is_safe(name):
                raise InvalidArgumentError(
                    "name the destination, because this has no name of its own"
                )
            target = os.path.join(target, name)
        elif not os.path.isdir(os.path.dirname(os.path.abspath(target))):
            raise NotFoundError("its directory does not exist", path=target)
        if os.path.lexists(target) and (not self._wanted.force or os.path.isdir(target)):
            raise ExistsError("it exists", path=target, hint="--force replaces a file")
        return target

    def _single(self, entry: Any, target: str) -> None:
        """Under a temporary name until it is complete."""
        directory = os.path.dirname(os.path.abspath(target))
        fd, part = tempfile.mkstemp(prefix=".vhdx-cp-", dir=directory)
        try:
            with os.fdopen(fd, "wb") as file:
                self._content(entry, file)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(part, int(entry.stat().st_mode) & 0o777 & ~umask)
            _set_time(entry, part)
            if self._wanted.force:
                os.replace(part, target)
            else:
                os.link(part, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        self._files += 1

    def _tree(self, entry: Any, target: str, depth: int) -> None:
        os.mkdir(target)
        if depth > _DEEPEST:
            self._failures.append(f"{target}: the directories are nested too deeply")
            return
        for each in children(entry):
            if not _is_safe(each.name):
                self._failures.append(f"{target}: the name {each.name!r} cannot be used")
                continue
            path = os.path.join(target, each.name)
            try:
                self._one(each, path, depth)
            except Exception as error:
                self._failures.append(f"{path}: {error}")

    def _one(self, entry: Any, path: str, depth: int) -> None:
        mode = int(entry.lstat().st_mode)
        if stat.S_ISLNK(mode):
            os.symlink(str(entry.readlink()), path)
        elif stat.S_ISDIR(mode):
            self._tree(entry, path, depth + 1)
        elif stat.S_ISREG(mode):
            fd = os.open(path, _EXCLUSIVE, mode & 0o777)
            try:
                with os.fdopen(fd, "wb") as file:
                    self._content(entry, file)
            except BaseException:
                os.unlink(path)
                raise
            _set_time(entry, path)
            self._files += 1
        else:
            self._failures.append(f"{path}: it is a device, a socket or a pipe")

    def _content(self, entry: Any, file: BinaryIO) -> None:
        """Zeros become holes."""
        with entry.open() as source:
            while piece := source.read(_PIECE):
                if piece.count(0) == len(piece):
                    file.seek(len(piece), os.SEEK_CUR)
                else:
                    file.write(piece)
                self._done += len(piece)
                self._tell()
        file.truncate()

    def _tell(self, failures: Sequence[str] = ()) -> None:
        state = Copied(self._done, max(self._total, self._done), self._files, list(failures))
        self._out.write(json.dumps(msgspec.to_builtins(state)).encode() + b"\n")
        self._out.flush()


def _set_time(entry: Any, path: str) -> None:
    modified = float(entry.stat().st_mtime)
    with contextlib.suppress(OSError, OverflowError, ValueError):  # times can be nonsense
        os.utime(path, (modified, modified))


def _is_safe(name: str) -> bool:
    """Whether a name is one component of a path."""
    return bool(name) and name not in {".", ".."} and "/" not in name and "\0" not in name


def _size_of(entry: Any, depth: int) -> int:
    """Bytes in a directory, for the progress."""
    total = 0
    for each in children(entry) if depth <= _DEEPEST else ():
        with contextlib.suppress(Exception):  # it is reported when it is copied
            status = each.lstat()
            if stat.S_ISDIR(status.st_mode):
                total += _size_of(each, depth + 1)
            elif stat.S_ISREG(status.st_mode):
                total += int(status.st_size)
    return total
