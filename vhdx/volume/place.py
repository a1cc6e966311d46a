# SPDX-License-Identifier: MIT
"""Volumes and spaces as a place of images: ``space://pool/space/name`` and ``space://pool/space``.

A pool is opened when its first path is used, and stays open for a moment after the last use, so that
a command which touches several files opens it once.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from vhdx import place, plane
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    ReadOnlyError,
    Reason,
    VhdxError,
)
from vhdx.interrupts import uninterruptible
from vhdx.spaces import Pool, hints
from vhdx.volume.state import PAGE
from vhdx.volume.volume import FileInfo, Volume

__all__ = [
    "SCHEME",
    "SpacePlace",
    "lend_pool",
    "list_files",
    "opened_pool",
    "remove_file",
    "rename_file",
]

SCHEME = "space"
_LINGER = 0.5  # seconds for which a pool stays open after its last use


class _Path(NamedTuple):
    """The parts of ``space:/pool/space/name``; empty where it ends earlier."""

    pool: str
    space: str
    name: str


def _parts(path: str) -> _Path:
    text = place.spelled(path)
    parts = text.partition(":/")[2].strip("/").split("/")
    if len(parts) > 3 or not parts[0]:
        raise InvalidArgumentError(
            "a path in a pool is space://POOL/SPACE/NAME, or space://POOL/SPACE", path=path
        )
    return _Path(*parts, *[""] * (3 - len(parts)))


@dataclass
class _OpenPool:
    """A pool that this process has open."""

    pool: Pool
    owned: bool  # this place closes it
    uses: int = 0
    volumes: dict[str, Volume] = field(default_factory=dict)
    timer: threading.Timer | None = None


class SpaceFile:
    """An open file of a volume, or a space; see :class:`vhdx.place.ImageFile`."""

    def __init__(
        self,
        owner: SpacePlace,
        path: str,
        opened: _OpenPool,
        volume: Volume | None,
        number: int,
        *,
        write: bool,
        locked: bool,
        sparse: bool,
    ) -> None:
        self.path, self.read_only, self.sparse = path, not write, sparse
        self._owner, self._opened, self._volume, self._number = owner, opened, volume, number
        self._write, self._locked = write, locked
        self._closed = False
        pool = zlib.crc32(opened.pool.id.bytes)
        if volume is None:
            self.key = (1 << 62 | pool, number << 32)
            self.leaf: plane.Device = opened.pool.device(number)
        else:
            self.key = (1 << 62 | pool, volume.number << 32 | number)
            self.leaf = volume.file(number).device

    def set_aside(self, offset: int, length: int) -> None:
        """Gives the range space and pages, durably."""
        if self._volume is not None:
            self._volume.file(self._number).set_aside(offset, length)

    def allocated(self) -> int:
        """Bytes that the file takes of its volume."""
        if self._volume is None:
            return self.leaf.size
        with self._volume.lock:
            return self._volume.state.files[self._number].pages * PAGE

    def freeze(self, path: str) -> None:
        """Makes the file, now named ``path``, read-only."""
        self.path, self.leaf.path, self.read_only = path, path, True
        self.leaf.freeze()
        if self._volume is not None and self._write and self._locked:
            self._volume.become_reader(self._number)
            self._write = False

    def close(self) -> None:
        """Ends the use of the file."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._volume is None:
                self._opened.pool.give_back(self._number)
                self._owner.release_space(self._opened, self._number)
            else:
                self._volume.release(self._number, write=self._write, locked=self._locked)
        finally:
            self._owner.end_use(self._opened)


class _SpaceDraft:
    """A new file of a volume that has no name yet."""

    def __init__(self, owner: SpacePlace, path: str, *, sparse: bool) -> None:
        opened = owner.use(_parts(path).pool, write=True)
        try:
            self._volume = owner.volume(opened, _parts(path))
            self._number = self._volume.create()
        except BaseException:
            owner.end_use(opened)
            raise
        self.file = SpaceFile(
            owner, path, opened, self._volume, self._number, write=True, locked=True, sparse=sparse
        )

    def keep_attributes(self, source: str) -> None:
        """There are none."""

    def take(self, path: str, *, replace: bool) -> None:
        self._volume.name_file(self._number, _parts(path).name, replace=replace)

    def discard(self) -> None:
        """A file without a name goes away when it is closed."""


class _SpaceOverwritten:
    """A space that is written over: it has its name, its size and its old content."""

    def __init__(self, file: SpaceFile) -> None:
        self.file = file

    def keep_attributes(self, source: str) -> None:
        """A space keeps its own."""

    def take(self, path: str, *, replace: bool) -> None:
        """It has its name already."""

    def discard(self) -> None:
        """A space stays."""


class SpacePlace:
    """Pools, spaces and volumes; see :class:`vhdx.place.Place`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pools: dict[str, _OpenPool] = {}
        self._raw: dict[int, list[bool]] = {}  # by id of the pool's entry and space: writers
        atexit.register(self.close_all)

    # ---- pools ----

    def lend(self, pool: Pool) -> None:
        """Uses an open pool of the caller's for its paths, until :meth:`take_away`."""
        with self._lock:
            if pool.name in self._pools:
                self._close(self._pools[pool.name])
            self._pools[pool.name] = _OpenPool(pool, owned=False)

    def take_away(self, pool: Pool) -> None:
        """Ends :meth:`lend`.

        Raises:
            InUseError: a file of it is open.
        """
        with self._lock:
            opened = self._pools.get(pool.name)
            if opened is not None and opened.pool is pool:
                if opened.uses:
                    raise InUseError("files of the pool are open", path=pool.name)
                self._close(opened)

    def use(self, name: str, *, write: bool) -> _OpenPool:
        """Begins a use of a pool, which is opened if it is not open."""
        with self._lock:
            opened = self._pools.get(name)
            if opened is not None and write and opened.pool.read_only:
                if opened.uses or not opened.owned:
                    raise ReadOnlyError("the pool is open for reading only", path=name)
                self._close(opened)
                opened = None
            if opened is None:
                opened = _OpenPool(Pool.open(name, "r+" if write else "r"), owned=True)
                self._pools[name] = opened
            if opened.timer is not None:
                opened.timer.cancel()
                opened.timer = None
            opened.uses += 1
            return opened

    def end_use(self, opened: _OpenPool) -> None:
        """Ends a use; the pool is closed a moment after the last."""
        with self._lock:
            opened.uses -= 1
            if opened.uses or not opened.owned:
                return
            opened.timer = threading.Timer(_LINGER, self._close_idle, [opened])
            opened.timer.daemon = True
            opened.timer.start()

    def _close_idle(self, opened: _OpenPool) -> None:
        with self._lock:
            if not opened.uses:
                self._close(opened)

    def _close(self, opened: _OpenPool) -> None:
        if opened.timer is not None:
            opened.timer.cancel()
        self._pools.pop(opened.pool.name, None)
        for volume in opened.volumes.values():
            volume.close()
        opened.volumes.clear()
        if opened.owned:
            opened.pool.close()

    def close_all(self) -> None:
        """Closes pools that nobody uses."""
        with self._lock:
            for opened in list(self._pools.values()):
                if not opened.uses:
                    with contextlib.suppress(VhdxError):
                        self._close(opened)

    def volume(self, opened: _OpenPool, parts: _Path) -> Volume:
        """The volume of a space; opens it if needed.

        Raises:
            NotFoundError, InvalidArgumentError: there is none, or it is a raw disk.
        """
        with self._lock:
            found = opened.volumes.get(parts.space)
            if found is None:
                if not opened.pool.has_volume(parts.space):
                    raise InvalidArgumentError(
                        f"space {parts.space!r} is a raw disk, and has no files", path=parts.pool
                    )
                found = opened.volumes[parts.space] = Volume(opened.pool, parts.space)
            return found

    @contextlib.contextmanager
    def using(self, path: str, *, write: bool = False) -> Iterator[Volume]:
        """The volume that a path leads into, while the block lasts."""
        parts = _parts(path)
        opened = self._use_for_names(path, write=write)
        try:
            yield self.volume(opened, parts)
        finally:
            self.end_use(opened)

    def _use_for_names(self, path: str, *, write: bool) -> _OpenPool:
        try:
            return self.use(_parts(path).pool, write=write)
        except NotFoundError as error:
            raise FileNotFoundError(str(error)) from error

    # ---- files ----

    def open(self, path: str, *, write: bool, sparse: bool = True, locked: bool = True) -> SpaceFile:
        parts = _parts(path)
        opened = self.use(parts.pool, write=write)
        try:
            if not parts.name:
                return self._open_space(path, opened, parts, write=write, sparse=sparse)
            volume = self.volume(opened, parts)
            try:
                number = volume.find(parts.name)
            except FileNotFoundError as error:
                raise NotFoundError("there is no such file", path=path) from error
            volume.open(number, write=write, locked=locked)
            return SpaceFile(
                self, path, opened, volume, number, write=write, locked=locked, sparse=sparse
            )
        except BaseException:
            self.end_use(opened)
            raise

    def _open_space(
        self, path: str, opened: _OpenPool, parts: _Path, *, write: bool, sparse: bool
    ) -> SpaceFile:
        if not parts.space or opened.pool.has_volume(parts.space):
            raise HostIOError(
                "it is a volume" if parts.space else "it is a pool",
                reason=Reason.NOT_A_FILE,
                path=path,
                hint="name a file in it",
            )
        number = opened.pool.take(parts.space)
        users = self._raw.setdefault(number, [])
        if users and (write or any(users)):
            opened.pool.give_back(number)
            raise InUseError("it is open already in this process", path=path)
        users.append(write)
        return SpaceFile(self, path, opened, None, number, write=write, locked=True, sparse=sparse)

    def release_space(self, opened: _OpenPool, number: int) -> None:
        """Ends a use of a raw space."""
        del opened
        with self._lock:
            self._raw.pop(number, None)

    def draft(self, path: str, *, sparse: bool = True, bulk: bool = False) -> _SpaceDraft:
        del bulk
        if not _parts(path).name:
            raise FileExistsError(path)
        return _SpaceDraft(self, path, sparse=sparse)

    def overwrite(self, path: str, *, sparse: bool = True) -> _SpaceOverwritten:
        return _SpaceOverwritten(self.open(path, write=True, sparse=sparse))

    @contextlib.contextmanager
    def guard(self, path: str) -> Iterator[None]:
        if not _parts(path).name:
            yield  # the overwriting opens it, and holds it
            return
        file = self.open(path, write=True)
        try:
            yield
        finally:
            file.close()

    # ---- names ----

    def real(self, path: str) -> str:
        return place.spelled(path)

    def key(self, path: str) -> place.Key:
        parts = _parts(path)
        with contextlib.suppress(VhdxError):
            identity = self._identity(parts.pool)
            if not parts.name:
                raise FileNotFoundError(path)
            with self.using(path) as volume:
                return 1 << 62 | zlib.crc32(identity), volume.number << 32 | volume.find(parts.name)
        raise FileNotFoundError(path)

    def _identity(self, name: str) -> bytes:
        opened = self._pools.get(name)
        return opened.pool.id.bytes if opened is not None else hints.find_hint(name).pool.bytes

    def exists(self, path: str) -> bool:
        return self.kind(path) is not None

    def kind(self, path: str) -> str | None:
        parts = _parts(path)
        try:
            opened = self._use_for_names(path, write=False)
        except FileNotFoundError:
            return None
        try:
            if parts.space not in opened.pool.space_names():
                return None
            if not parts.name:
                return None if opened.pool.has_volume(parts.space) else "device"
            names = self.volume(opened, parts).state.names
            return "file" if parts.name in names else None
        finally:
            self.end_use(opened)

    def is_same_name(self, path: str, other: str) -> bool:
        return self.real(path) == self.real(other)

    def peek(self, path: str, length: int) -> bytes:
        file = self.open(path, write=False, locked=False)
        try:
            return file.leaf.read(min(length, file.leaf.size), 0)
        finally:
            file.close()

    def links(self, path: str) -> int:
        with self.using(path) as volume:
            return volume.state.links(volume.find(_parts(path).name))

    def names(self, directory: str) -> list[str]:
        with self.using(directory) as volume:
            return sorted(volume.state.names)

    def link(self, path: str, other: str) -> None:
        with self.using(path, write=True) as volume:
            volume.name_file(volume.find(_parts(path).name), _parts(other).name, replace=False)

    def rename(self, path: str, other: str) -> None:
        with self.using(path, write=True) as volume:
            volume.rename(_parts(path).name, _parts(other).name)

    def remove(self, path: str) -> None:
        with self.using(path, write=True) as volume:
            volume.remove(_parts(path).name)

    def sync(self, directory: str) -> None:
        """Names are durable when they are given."""

    def check_replaceable(self, path: str) -> None:
        """Everything can be replaced."""

    def keep_attributes(self, source: str, path: str) -> None:
        """There are none."""

    def note(self, path: str) -> bytes:
        try:
            with self.using(path) as volume:
                return volume.state.files[volume.find(_parts(path).name)].note
        except (OSError, VhdxError):
            return b""

    def change_note(self, path: str, change: Callable[[bytes], bytes]) -> None:
        with self.using(path, write=True) as volume:
            volume.change_note(volume.find(_parts(path).name), change)


_place = SpacePlace()
place.register(SCHEME, _place)


@contextlib.contextmanager
def lend_pool(pool: Pool) -> Iterator[None]:
    """Uses an open pool for paths of its name while the block lasts."""
    _place.lend(pool)
    try:
        yield
    finally:
        _place.take_away(pool)


def opened_pool(name: str) -> Pool | None:
    """The pool of this name, if this process has it open for its paths."""
    opened = _place._pools.get(name)
    return None if opened is None else opened.pool


def list_files(path: str) -> list[FileInfo]:
    """The files of a volume, ``space://pool/space``.

    Raises:
        NotFoundError, InvalidArgumentError: there is none.
    """
    _check(path)
    with _place.using(path) as volume:
        return volume.files()


@uninterruptible
def rename_file(path: str, other: str, *, force: bool = False) -> None:
    """Renames a file of a volume.

    Raises:
        NotFoundError: there is no such file.
        ExistsError: there is one of the new name.
        InvalidArgumentError: they are not in one volume.
    """
    if _check(path, is_file=True)[:2] != _check(other, is_file=True)[:2]:
        raise InvalidArgumentError("a file is renamed inside its volume", hint="use vhdx volume cp")
    if not force and _place.exists(other):
        raise ExistsError("it exists already", path=other, hint="use --force (force=True)")
    try:
        _place.rename(path, other)
    except FileNotFoundError as error:
        raise NotFoundError("there is no such file", path=path) from error


@uninterruptible
def remove_file(path: str) -> None:
    """Removes a file of a volume that nobody uses.

    Raises:
        NotFoundError: there is no such file.
        InUseError: it is open.
    """
    _check(path, is_file=True)
    try:
        with _place.guard(path):
            pass
        _place.remove(path)
    except FileNotFoundError as error:
        raise NotFoundError("there is no such file", path=path) from error


def _check(path: str, *, is_file: bool = False) -> _Path:
    if place.is_host(path):
        raise InvalidArgumentError("it is no path in a pool", path=path, hint="space://POOL/SPACE")
    parts = _parts(path)
    if is_file and not parts.name:
        raise InvalidArgumentError("it names no file", path=path, hint="space://POOL/SPACE/NAME")
    return parts
