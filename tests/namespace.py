# SPDX-License-Identifier: MIT
"""Records a workload on a directory: files and their names, and rebuilds what a crash may leave.

Inside :meth:`Directory.recorded` the leaf of every host file writes through this recorder, and so do
the calls that change names. What a barrier on a file covers survives; of its other writes any subset,
torn at sectors. Names change in the order in which they were changed, as with every journalling file
system: what a barrier on the directory covers survives, and of the rest any beginning.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.recording import Event, Window, apply, digest
from vhdx import plane


@dataclass
class Change:
    """One change of names, or of a file."""

    kind: str  # create link rename unlink dirsync, or "file"
    names: tuple[str, ...] = ()
    inode: int = 0
    event: Event | None = None


class Changes:
    """What was done to the names and files of a directory since recording began.

    Args:
        names: the inode of each name.
        files: the content of each inode.
    """

    def __init__(self, names: dict[str, int], files: dict[int, bytes]) -> None:
        self.names, self.files = names, files
        self.changes: list[Change] = []
        self.now = 0
        self._lock = threading.Lock()

    def note(self, kind: str, *names, inode: int = 0, event: Event | None = None) -> Event | None:
        own = tuple(Path(name).name for name in names)
        with self._lock:
            self.now += 1
            if event is not None:
                event.begin = self.now
            self.changes.append(Change(kind, own, inode, event))
        return event

    def end(self, event: Event) -> None:
        with self._lock:
            self.now += 1
            event.end = self.now

    # ---- crash states ----

    def states(self, rng: random.Random, subsets: int) -> Iterator[tuple[int, dict[str, bytes]]]:
        """The number of changes that had begun, and what is in the directory after a crash then."""
        windows = {inode: Window(bytearray(data)) for inode, data in self.files.items()}
        durable, pending = dict(self.names), []
        seen: set[tuple] = set()
        for number, change in enumerate(self.changes, 1):
            event = change.event
            if change.inode:  # a file may be written before it has a name
                windows.setdefault(change.inode, Window(bytearray()))
            if change.kind == "dirsync":
                for each in pending:
                    rename(durable, each)
                pending = []
                continue
            if event is None:
                pending.append(change)
            elif event.kind == "flush":
                windows[change.inode].pass_barrier(event)
                continue
            else:
                windows[change.inode].doubtful.append(event)
            for attempt in range(subsets + 2):
                names = dict(durable)
                taken = {0: 0, 1: len(pending)}.get(attempt, rng.randrange(len(pending) + 1))
                for each in pending[:taken]:
                    rename(names, each)
                contents = {
                    inode: self._content(windows[inode], rng, attempt) for inode in names.values()
                }
                key = tuple(sorted((n, digest(contents[i])) for n, i in names.items()))
                if key not in seen:
                    seen.add(key)
                    yield number, {name: bytes(contents[i]) for name, i in names.items()}

    @staticmethod
    def _content(window: Window, rng: random.Random, attempt: int) -> bytearray:
        data = bytearray(window.durable)
        for event in window.doubtful:
            whole = {0: 1.0, 1: 0.0}.get(attempt, rng.random())
            if whole < 0.5:
                apply(data, event)
            elif whole < 0.75 and event.kind != "resize":
                sectors = max(1, -(-event.length // 512))
                apply(data, event, [rng.random() < 0.5 for _ in range(sectors)])
        return data


class Directory(Changes):
    """A directory of the host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            {p.name: p.stat().st_ino for p in path.iterdir()},
            {p.stat().st_ino: p.read_bytes() for p in path.iterdir()},
        )
        self._known = set(self.files)

    def mine(self, path) -> bool:
        return Path(os.path.abspath(os.fsdecode(path))).parent == self.path

    def see(self, fd: int) -> int:
        """The inode of a descriptor; one that is new was created under the name that it has."""
        inode = os.fstat(fd).st_ino
        if inode not in self._known:
            self._known.add(inode)
            self.note("create", os.readlink(f"/proc/self/fd/{fd}"), inode=inode)
        return inode

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Records what happens inside."""
        patched = {
            (plane, "File"): _file_class(self),
            (os, "link"): self._named("link"),
            (os, "rename"): self._named("rename"),
            (os, "replace"): self._named("rename", os.replace),
            (os, "unlink"): self._named("unlink"),
            (os, "fsync"): self._fsync,
        }
        self._plain = {name: getattr(owner, name) for owner, name in patched}
        for (owner, name), new in patched.items():
            setattr(owner, name, new)
        try:
            yield
        finally:
            for owner, name in patched:
                setattr(owner, name, self._plain[name])

    def _named(self, kind: str, plain=None):
        plain = getattr(os, kind) if plain is None else plain

        def call(*names, **options):
            plain(*names, **options)
            if self.mine(names[0]):
                self.note(kind, *names)

        return call

    def _fsync(self, fd: int) -> None:
        self._plain["fsync"](fd)
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self.note("dirsync")
            return
        inode = self.see(fd)  # written by Python; all of it at this moment
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            content = file.read()
        for event in (Event("write", 0, len(content), content), Event("flush")):
            self.note("file", inode=inode, event=event)
            self.end(event)


def rename(names: dict[str, int], change: Change) -> None:
    """Does a change of names."""
    if change.kind == "create":
        names[change.names[0]] = change.inode
    elif change.kind == "link":
        names[change.names[1]] = names[change.names[0]]
    elif change.kind == "rename":
        names[change.names[1]] = names.pop(change.names[0])
    else:
        del names[change.names[0]]


class _Backend:
    """A host file whose changes are recorded."""

    def __init__(self, directory: Directory, fd: int) -> None:
        self._directory, self.fd = directory, fd
        self._inode = directory.see(fd)

    def _record(self, kind: str, offset: int = 0, length: int = 0, data=None) -> None:
        event = Event(kind, offset, length, data)
        self._directory.note("file", inode=self._inode, event=event)
        self._directory.end(event)

    def pread_into(self, buffer, offset):
        os.preadv(self.fd, [buffer], offset)

    def pwrite(self, data, offset):
        os.pwrite(self.fd, data, offset)
        self._record("write", offset, len(data), bytes(data))

    def zero(self, offset, length):
        os.pwrite(self.fd, bytes(length), offset)
        self._record("zero", offset, length)

    trim = zero

    def flush(self):
        self._record("flush")

    def resize(self, size):
        os.ftruncate(self.fd, size)
        self._record("resize", size)

    def extents(self, offset, length):
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]


def _file_class(directory: Directory) -> type:
    real = plane.File

    class Recorded(plane.Callback):
        """Stands for the leaf of a host file."""

        def __new__(cls, fd, size, **options):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if not directory.mine(name) and not options.get("read_only"):
                return real(fd, size, **options)
            return super().__new__(cls)

        def __init__(self, fd, size, *, read_only, sparse=True, bulk=False, path=None):
            del sparse, bulk
            super().__init__(_Backend(directory, fd), size, read_only=read_only)
            self.path = path

        def close(self):
            if self.backend.fd >= 0:
                os.close(self.backend.fd)
            self.backend.fd = -1

    return Recorded


def written(path: Path, files: dict[str, bytes]) -> None:
    """Makes ``path`` hold these files and nothing else."""
    for each in path.iterdir():
        each.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)
