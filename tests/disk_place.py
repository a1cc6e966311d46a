# SPDX-License-Identifier: MIT
"""A place whose files are disks of a pool in memory: recorded by one clock, and failing on demand."""

from __future__ import annotations

import contextlib
import itertools
import os

from tests.recording import Log, Recorder
from vhdx import place, plane
from vhdx.errors import InUseError, NotFoundError

SCHEME = "disks"


class DiskFile:
    """An open disk; see :class:`vhdx.place.ImageFile`."""

    def __init__(self, owner: DiskPlace, path: str, *, write: bool, locked: bool) -> None:
        self._owner, self._name = owner, os.path.basename(path)
        self.path, self.read_only, self.sparse = path, not write, True
        self.key = owner.keys[self._name]
        if locked:
            others = owner.open_files.setdefault(self._name, [])
            if others and (write or any(not each.read_only for each in others)):
                raise InUseError("it is open already", path=path)
            others.append(self)
        self.leaf: plane.Device
        if owner.log is None:
            memory = owner.memories[self._name]
            self.hold = plane.Injector(memory, owner.pool)
            self.leaf = self.hold
        else:
            recorder = owner.recorders[self._name]
            self.leaf = plane.Callback(recorder, len(recorder.data), read_only=not write)
        self.leaf.path = path

    def set_aside(self, offset: int, length: int) -> None:
        """Memory needs nothing."""

    def allocated(self) -> int:
        return self.leaf.size

    def freeze(self, path: str) -> None:
        self.path = path

    def close(self) -> None:
        with contextlib.suppress(ValueError, KeyError):
            self._owner.open_files[self._name].remove(self)


class DiskPlace:
    """See :class:`vhdx.place.Place`; only what pools need.

    Args:
        contents: of each disk by name.
        log: records every change; None: nothing is recorded, and ``holds`` can fail requests.
    """

    def __init__(self, contents: dict[str, bytes], log: Log | None = None) -> None:
        self.log = log
        self.pool = plane.Pool(level=plane.Level.SPACE)
        self.open_files: dict[str, list[DiskFile]] = {}
        self.keys = dict(zip(contents, ((9, i) for i in itertools.count(1)), strict=False))
        self.recorders: dict[str, Recorder] = {}
        self.memories: dict[str, plane.Memory] = {}
        for leaf, (name, content) in enumerate(contents.items()):
            if log is not None:
                self.recorders[name] = Recorder(content, log=log, leaf=leaf)
            else:
                self.memories[name] = plane.Memory(len(content))
                self.memories[name].write(content, 0)
        place.register(SCHEME, self)

    def add(self, name: str, content: bytes) -> None:
        """A new disk, not recorded."""
        self.keys[name] = (9, 1000 + len(self.memories))
        self.memories[name] = plane.Memory(len(content))
        self.memories[name].write(content, 0)

    def hold(self, name: str) -> plane.Injector:
        """What fails requests of the open disk."""
        return self.open_files[name][-1].hold

    def paths(self) -> list[str]:
        return [f"{SCHEME}:/{name}" for name in self.keys]

    def open(self, path: str, *, write: bool, sparse: bool = True, locked: bool = True) -> DiskFile:
        if os.path.basename(path) not in self.keys:
            raise NotFoundError("there is no such disk", path=path)
        return DiskFile(self, path, write=write, locked=locked)

    def real(self, path: str) -> str:
        return path

    def key(self, path: str) -> place.Key:
        name = os.path.basename(path)
        if name not in self.keys:
            raise FileNotFoundError(path)
        return self.keys[name]

    def exists(self, path: str) -> bool:
        return os.path.basename(path) in self.keys

    def take_away(self, name: str) -> place.Key:
        """The disk vanishes; what is open stays open."""
        return self.keys.pop(name)

    def bring_back(self, name: str, key: place.Key) -> None:
        self.keys[name] = key
