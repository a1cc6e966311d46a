# SPDX-License-Identifier: MIT
"""A place in memory, whose changes are recorded as those of a directory of the host are.

It differs from the host's file systems where a volume will: a file that is not complete has no name
at all, a name is taken and replaced at one moment, and keys, links and notes are its own.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from tests.namespace import Changes
from tests.recording import Event, resized
from vhdx import place, plane
from vhdx.errors import InUseError, NotFoundError

SCHEME = "memory"


class PlacePath(PurePosixPath):
    """A path in a place, with what tests do to paths of the host."""

    def exists(self) -> bool:
        return place.of(self).exists(os.fspath(self))

    def read_bytes(self) -> bytes:
        file = place.open_file(self, write=False, locked=False)
        try:
            return file.leaf.read(file.leaf.size, 0)
        finally:
            file.close()

    def glob(self, pattern: str) -> list[PlacePath]:
        names = place.of(self).names(os.fspath(self))
        return [self / name for name in names if fnmatch.fnmatch(name, pattern)]


class _Backend:
    """A file in memory; its changes are noted while ``changes`` is set."""

    def __init__(self, owner: MemoryPlace, inode: int) -> None:
        self._owner, self._inode = owner, inode

    @property
    def data(self) -> bytearray:
        return self._owner.files[self._inode]

    def _record(self, kind: str, offset: int = 0, length: int = 0, data=None) -> None:
        changes = self._owner.changes
        if changes is not None:
            event = Event(kind, offset, length, data)
            changes.note("file", inode=self._inode, event=event)
            changes.end(event)

    def pread_into(self, buffer, offset):
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pwrite(self, data, offset):
        self.data[offset : offset + len(data)] = data
        self._record("write", offset, len(data), bytes(data))

    def zero(self, offset, length):
        self.data[offset : offset + length] = bytes(length)
        self._record("zero", offset, length)

    trim = zero

    def flush(self):
        self._record("flush")

    def resize(self, size):
        resized(self.data, size)
        self._record("resize", size)

    def extents(self, offset, length):
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]


class MemoryFile:
    """An open file; see :class:`vhdx.place.ImageFile`."""

    def __init__(self, owner: MemoryPlace, path: str, inode: int, *, write: bool, locked: bool):
        self.path, self.read_only, self.sparse, self.key = path, not write, True, (7, inode)
        if locked:
            owner.lock(path, inode, self)
        self._owner, self._inode = owner, inode
        self.leaf = plane.Callback(
            _Backend(owner, inode), len(owner.files[inode]), read_only=not write
        )
        self.leaf.path = path

    def set_aside(self, offset: int, length: int) -> None:
        """Memory needs nothing."""

    def allocated(self) -> int:
        return len(self._owner.files[self._inode])

    def freeze(self, path: str) -> None:
        self.path, self.leaf.path, self.read_only = path, path, True

    def close(self) -> None:
        self._owner.unlock(self._inode, self)


class MemoryDraft:
    """See :class:`vhdx.place.Draft`."""

    def __init__(self, owner: MemoryPlace, path: str) -> None:
        self._owner, self._inode = owner, owner.new_inode()
        self.file = MemoryFile(owner, path, self._inode, write=True, locked=True)

    def keep_attributes(self, source: str) -> None:
        """There are none."""

    def take(self, path: str, *, replace: bool) -> None:
        if not replace and path in self._owner.inodes:
            raise FileExistsError(path)
        self._owner.inodes[path] = self._inode
        self._owner.record("create", path, inode=self._inode)

    def discard(self) -> None:
        """A file without a name is gone when it is closed."""


class MemoryPlace:
    """See :class:`vhdx.place.Place`. ``changes`` records while it is set."""

    def __init__(self, directory: str, content: dict[str, bytes]) -> None:
        self._inodes = itertools.count(100)
        self.files: dict[int, bytearray] = {}
        self.inodes: dict[str, int] = {}
        self.notes: dict[int, bytes] = {}
        self._open: dict[int, list[MemoryFile]] = {}
        self.changes: Changes | None = None
        for name, data in content.items():
            self.inodes[f"{directory}/{name}"] = inode = self.new_inode()
            self.files[inode][:] = data

    def recording(self) -> Changes:
        """From now on, what is done is recorded."""
        names = {os.path.basename(path): inode for path, inode in self.inodes.items()}
        self.changes = Changes(names, {i: bytes(self.files[i]) for i in self.inodes.values()})
        return self.changes

    def content(self) -> dict[str, bytes]:
        return {os.path.basename(path): bytes(self.files[i]) for path, i in self.inodes.items()}

    def record(self, kind: str, *names: str, inode: int = 0) -> None:
        if self.changes is not None:
            self.changes.note(kind, *names, inode=inode)

    def new_inode(self) -> int:
        inode = next(self._inodes)
        self.files[inode] = bytearray()
        return inode

    def lock(self, path: str, inode: int, file: MemoryFile) -> None:
        others = self._open.setdefault(inode, [])
        if others and (not file.read_only or any(not each.read_only for each in others)):
            raise InUseError("it is open already", path=path)
        others.append(file)

    def unlock(self, inode: int, file: MemoryFile) -> None:
        with contextlib.suppress(ValueError, KeyError):
            self._open[inode].remove(file)

    def _inode(self, path: str) -> int:
        if path not in self.inodes:
            raise FileNotFoundError(path)
        return self.inodes[path]

    def open(self, path: str, *, write: bool, sparse: bool = True, locked: bool = True) -> MemoryFile:
        if path not in self.inodes:
            raise NotFoundError("there is no such file", path=path)
        return MemoryFile(self, path, self.inodes[path], write=write, locked=locked)

    def draft(self, path: str, *, sparse: bool = True, bulk: bool = False) -> MemoryDraft:
        return MemoryDraft(self, path)

    def overwrite(self, path: str, *, sparse: bool = True) -> MemoryDraft:
        raise AssertionError("there are no devices here")

    @contextlib.contextmanager
    def guard(self, path: str) -> Iterator[None]:
        file = self.open(path, write=True)
        try:
            yield
        finally:
            file.close()

    def real(self, path: str) -> str:
        return path

    def key(self, path: str) -> place.Key:
        return 7, self._inode(path)

    def exists(self, path: str) -> bool:
        return path in self.inodes

    def kind(self, path: str) -> str | None:
        return "file" if path in self.inodes else None

    def is_same_name(self, path: str, other: str) -> bool:
        return path == other

    def peek(self, path: str, length: int) -> bytes:
        return bytes(self.files[self._inode(path)][:length])

    def links(self, path: str) -> int:
        inode = self._inode(path)
        return sum(each == inode for each in self.inodes.values())

    def names(self, directory: str) -> list[str]:
        return [os.path.basename(p) for p in self.inodes if os.path.dirname(p) == directory]

    def link(self, path: str, other: str) -> None:
        if other in self.inodes:
            raise FileExistsError(other)
        self.inodes[other] = self._inode(path)
        self.record("link", path, other)

    def rename(self, path: str, other: str) -> None:
        self.inodes[other] = self._inode(path)
        del self.inodes[path]
        self.record("rename", path, other)

    def remove(self, path: str) -> None:
        self._inode(path)
        del self.inodes[path]
        self.record("unlink", path)

    def sync(self, directory: str) -> None:
        self.record("dirsync")

    def check_replaceable(self, path: str) -> None:
        """Everything can be replaced."""

    def keep_attributes(self, source: str, path: str) -> None:
        """There are none."""

    def note(self, path: str) -> bytes:
        return self.notes.get(self.inodes.get(path, 0), b"")

    def change_note(self, path: str, change: Callable[[bytes], bytes]) -> None:
        inode = self._inode(path)
        self.notes[inode] = change(self.notes.get(inode, b""))
