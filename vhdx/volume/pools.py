# SPDX-License-Identifier: MIT
"""The pools that this process has open for its paths."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from vhdx import place
from vhdx.errors import (
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    ReadOnlyError,
    VhdxError,
)
from vhdx.spaces import Pool, hints
from vhdx.volume.volume import Volume

__all__ = ["OpenPool", "OpenPools", "PoolPath", "parts_of"]

_LINGER = 0.5  # seconds for which a pool stays open after its last use


class PoolPath(NamedTuple):
    """The parts of ``space:/pool/space/name``; empty where it ends earlier."""

    pool: str
    space: str
    name: str


def parts_of(path: str) -> PoolPath:
    """The parts of a path.

    Raises:
        InvalidArgumentError: it has too many, or names no pool.
    """
    text = place.spelled(path)
    parts = text.partition(":/")[2].strip("/").split("/")
    if len(parts) > 3 or not parts[0]:
        raise InvalidArgumentError(
            "a path in a pool is space://POOL/SPACE/NAME, or space://POOL/SPACE", path=path
        )
    return PoolPath(*parts, *[""] * (3 - len(parts)))


@dataclass
class OpenPool:
    """A pool that this process has open."""

    pool: Pool
    name: str  # by which paths name it
    owned: bool  # this place closes it
    uses: int = 0
    volumes: dict[str, Volume] = field(default_factory=dict)
    timer: threading.Timer | None = None


class OpenPools:
    """Opens pools when a path needs them, and closes them a moment after the last use."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pools: dict[str, OpenPool] = {}
        atexit.register(self.close_all)

    def lend(self, pool: Pool) -> None:
        """Uses an open pool of the caller's for its paths, until :meth:`take_away`."""
        with self._lock:
            other = self._pools.get(pool.name)
            if other is not None and other.uses:
                raise InUseError("files of the pool are open", path=pool.name)
            if other is not None:
                self._close(other)
            self._pools[pool.name] = OpenPool(pool, pool.name, owned=False)

    def take_away(self, pool: Pool) -> None:
        """Ends :meth:`lend`.

        Raises:
            InUseError: a file of it is open.
        """
        with self._lock:
            opened = next((each for each in self._pools.values() if each.pool is pool), None)
            if opened is not None:
                if opened.uses:
                    raise InUseError("files of the pool are open", path=pool.name)
                self._close(opened)

    def use(self, name: str, *, write: bool) -> OpenPool:
        """Begins a use of a pool, which is opened if it is not open."""
        with self._lock:
            opened = self._pools.get(name)
            is_idle = opened is not None and opened.owned and not opened.uses
            if opened is not None and is_idle and hints.find_hint(name).pool != opened.pool.id:
                self._close(opened)  # another pool has the name now
                opened = None
            if opened is not None and write and opened.pool.read_only:
                if opened.uses or not opened.owned:
                    raise ReadOnlyError("the pool is open for reading only", path=name)
                self._close(opened)
                opened = None
            if opened is None:
                opened = OpenPool(Pool.open(name, "r+" if write else "r"), name, owned=True)
                self._pools[name] = opened
            if opened.timer is not None:
                opened.timer.cancel()
                opened.timer = None
            opened.uses += 1
            return opened

    def end_use(self, opened: OpenPool) -> None:
        """Ends a use; the pool is closed a moment after the last."""
        with self._lock:
            opened.uses -= 1
            if opened.uses or not opened.owned:
                return
            opened.timer = threading.Timer(_LINGER, self._close_idle, [opened])
            opened.timer.daemon = True
            opened.timer.start()

    def _close_idle(self, opened: OpenPool) -> None:
        with self._lock:
            if not opened.uses:
                self._close(opened)

    def _close(self, opened: OpenPool) -> None:
        if opened.timer is not None:
            opened.timer.cancel()
        if self._pools.get(opened.name) is not opened:
            return  # it was closed already, and another one may have its place
        del self._pools[opened.name]
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

    def volume(self, opened: OpenPool, parts: PoolPath) -> Volume:
        """The volume of a space; opens it if needed.

        Raises:
            NotFoundError, InvalidArgumentError: there is none, or it is a raw disk.
        """
        with self._lock:
            found = opened.volumes.get(parts.space)
            if found is None:
                if not opened.pool.leases.has_volume(parts.space):
                    raise InvalidArgumentError(
                        f"space {parts.space!r} is a raw disk, and has no files", path=parts.pool
                    )
                found = opened.volumes[parts.space] = Volume(opened.pool, parts.space)
            return found

    @contextlib.contextmanager
    def using(self, path: str, *, write: bool = False) -> Iterator[Volume]:
        """The volume that a path leads into, while the block lasts."""
        parts = parts_of(path)
        opened = self.use_for_names(path, write=write)
        try:
            yield self.volume(opened, parts)
        finally:
            self.end_use(opened)

    def use_for_names(self, path: str, *, write: bool) -> OpenPool:
        try:
            return self.use(parts_of(path).pool, write=write)
        except NotFoundError as error:
            raise FileNotFoundError(str(error)) from error

    def find(self, name: str) -> Pool | None:
        """The pool of this name, if it is open."""
        opened = self._pools.get(name)
        return None if opened is None else opened.pool

    def identity(self, name: str) -> bytes:
        """The UUID of a pool, also of one that is not open.

        Raises:
            NotFoundError: nothing is known of it.
        """
        pool = self.find(name)
        return hints.find_hint(name).pool.bytes if pool is None else pool.id.bytes
