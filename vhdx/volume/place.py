# SPDX-License-Identifier: MIT
"""Volumes and spaces as a place of images: ``space://pool/space/name`` and ``space://pool/space``.

A pool is opened when its first path is used, and stays open for a moment after the last use, so that
a command which touches several files opens it once.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator

from vhdx import place, plane
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    VhdxError,
)
from vhdx.interrupts import uninterruptible
from vhdx.spaces import Pool
from vhdx.volume.pools import OpenPool, OpenPools, PoolPath, parts_of
from vhdx.volume.state import PAGE
from vhdx.volume.volume import FileInfo, Volume

__all__ = [
    "SCHEME",
    "SpacePlace",
    "lend_pool",
    "list_files",
    "opened_pool",
    "pool_of",
    "remove_file",
    "rename_file",
]

SCHEME = "space"


class SpaceFile:
    """An open file of a volume, or a space; see :class:`vhdx.place.ImageFile`."""

    def __init__(
        self,
        owner: SpacePlace,
        path: str,
        opened: OpenPool,
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
            self.leaf: plane.Device = opened.pool.leases.device(number)
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
                leases = self._opened.pool.leases
                leases.end_raw(self._number, write=self._write, locked=self._locked)
            else:
                self._volume.release(self._number, write=self._write, locked=self._locked)
        finally:
            self._owner.pools.end_use(self._opened)


class _SpaceDraft:
    """A new file of a volume that has no name yet."""

    def __init__(self, owner: SpacePlace, path: str, *, sparse: bool) -> None:
        opened = owner.pools.use(parts_of(path).pool, write=True)
        try:
            self._volume = owner.pools.volume(opened, parts_of(path))
            self._number = self._volume.create()
        except BaseException:
            owner.pools.end_use(opened)
            raise
        self.file = SpaceFile(
            owner, path, opened, self._volume, self._number, write=True, locked=True, sparse=sparse
        )

    def keep_attributes(self, source: str) -> None:
        """There are none."""

    def take(self, path: str, *, replace: bool) -> None:
        self._volume.name_file(self._number, parts_of(path).name, replace=replace)

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

    def __init__(self, pools: OpenPools) -> None:
        self.pools = pools

    # ---- files ----

    def open(self, path: str, *, write: bool, sparse: bool = True, locked: bool = True) -> SpaceFile:
        parts = parts_of(path)
        opened = self.pools.use(parts.pool, write=write)
        try:
            if not parts.name:
                return self._open_space(
                    path, opened, parts, write=write, sparse=sparse, locked=locked
                )
            volume = self.pools.volume(opened, parts)
            try:
                number = volume.find(parts.name)
            except FileNotFoundError as error:
                raise NotFoundError("there is no such file", path=path) from error
            volume.open(number, write=write, locked=locked)
            return SpaceFile(
                self, path, opened, volume, number, write=write, locked=locked, sparse=sparse
            )
        except BaseException:
            self.pools.end_use(opened)
            raise

    def _open_space(
        self,
        path: str,
        opened: OpenPool,
        parts: PoolPath,
        *,
        write: bool,
        sparse: bool,
        locked: bool,
    ) -> SpaceFile:
        if not parts.space or opened.pool.leases.has_volume(parts.space):
            raise HostIOError(
                "it is a volume" if parts.space else "it is a pool",
                reason=Reason.NOT_A_FILE,
                path=path,
                hint="name a file in it",
            )
        number = opened.pool.leases.begin_raw(parts.space, write=write, locked=locked)
        return SpaceFile(self, path, opened, None, number, write=write, locked=locked, sparse=sparse)

    def draft(self, path: str, *, sparse: bool = True, bulk: bool = False) -> _SpaceDraft:
        del bulk
        if not parts_of(path).name:
            raise FileExistsError(path)
        return _SpaceDraft(self, path, sparse=sparse)

    def overwrite(self, path: str, *, sparse: bool = True) -> _SpaceOverwritten:
        return _SpaceOverwritten(self.open(path, write=True, sparse=sparse))

    @contextlib.contextmanager
    def guard(self, path: str) -> Iterator[None]:
        if not parts_of(path).name:
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
        parts = parts_of(path)
        with contextlib.suppress(VhdxError):
            identity = self.pools.identity(parts.pool)
            if not parts.name:
                raise FileNotFoundError(path)
            with self.pools.using(path) as volume:
                return 1 << 62 | zlib.crc32(identity), volume.number << 32 | volume.find(parts.name)
        raise FileNotFoundError(path)

    def exists(self, path: str) -> bool:
        return self.kind(path) is not None

    def kind(self, path: str) -> str | None:
        parts = parts_of(path)
        try:
            opened = self.pools.use_for_names(path, write=False)
        except FileNotFoundError:
            return None
        try:
            if parts.space not in opened.pool.space_names():
                return None
            if not parts.name:
                return None if opened.pool.leases.has_volume(parts.space) else "device"
            names = self.pools.volume(opened, parts).state.names
            return "file" if parts.name in names else None
        finally:
            self.pools.end_use(opened)

    def is_same_name(self, path: str, other: str) -> bool:
        return self.real(path) == self.real(other)

    def peek(self, path: str, length: int) -> bytes:
        file = self.open(path, write=False, locked=False)
        try:
            return file.leaf.read(min(length, file.leaf.size), 0)
        finally:
            file.close()

    def links(self, path: str) -> int:
        with self.pools.using(path) as volume:
            return volume.state.links(volume.find(parts_of(path).name))

    def names(self, directory: str) -> list[str]:
        with self.pools.using(directory) as volume:
            return sorted(volume.state.names)

    def link(self, path: str, other: str) -> None:
        with self.pools.using(path, write=True) as volume:
            volume.name_file(volume.find(parts_of(path).name), parts_of(other).name, replace=False)

    def rename(self, path: str, other: str) -> None:
        with self.pools.using(path, write=True) as volume:
            volume.rename(parts_of(path).name, parts_of(other).name)

    def remove(self, path: str) -> None:
        with self.pools.using(path, write=True) as volume:
            volume.remove(parts_of(path).name)

    def sync(self, directory: str) -> None:
        """Names are durable when they are given."""

    def check_replaceable(self, path: str) -> None:
        """Everything can be replaced."""

    def keep_attributes(self, source: str, path: str) -> None:
        """There are none."""

    def note(self, path: str) -> bytes:
        try:
            with self.pools.using(path) as volume:
                return volume.state.files[volume.find(parts_of(path).name)].note
        except (OSError, VhdxError):
            return b""

    def change_note(self, path: str, change: Callable[[bytes], bytes]) -> None:
        with self.pools.using(path, write=True) as volume:
            volume.change_note(volume.find(parts_of(path).name), change)


_pools = OpenPools()
_place = SpacePlace(_pools)
place.register(SCHEME, _place)


@contextlib.contextmanager
def lend_pool(pool: Pool) -> Iterator[None]:
    """Uses an open pool for paths of its name while the block lasts."""
    _pools.lend(pool)
    try:
        yield
    finally:
        _pools.take_away(pool)


def opened_pool(name: str) -> Pool | None:
    """The pool of this name, if this process has it open for its paths."""
    return _pools.find(name)


def pool_of(path: str) -> str | None:
    """The name of the pool that a path leads into; None for a path of the host."""
    return None if place.is_host(path) else parts_of(path).pool


def list_files(path: str) -> list[FileInfo]:
    """The files of a volume, ``space://pool/space``.

    Raises:
        NotFoundError, InvalidArgumentError: there is none.
    """
    _check(path)
    with _pools.using(path) as volume:
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
        with _place.guard(other) if _place.exists(other) else contextlib.nullcontext():
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


def _check(path: str, *, is_file: bool = False) -> PoolPath:
    if place.is_host(path):
        raise InvalidArgumentError("it is no path in a pool", path=path, hint="space://POOL/SPACE")
    parts = parts_of(path)
    if is_file and not parts.name:
        raise InvalidArgumentError("it names no file", path=path, hint="space://POOL/SPACE/NAME")
    return parts
