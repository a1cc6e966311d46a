# SPDX-License-Identifier: MIT
"""Pools of disks: implements :class:`vhdx.Pool`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vhdx.errors import ExistsError, InUseError, InvalidArgumentError, VhdxError
from vhdx.interrupts import uninterruptible
from vhdx.spaces import hints
from vhdx.spaces.disks import DiskSpec, check_name
from vhdx.spaces.making import make_core
from vhdx.spaces.opening import open_core
from vhdx.spaces.pool_disks import DisksOfPool
from vhdx.spaces.pool_spaces import SpacesOfPool
from vhdx.spaces.states import RetirePolicy
from vhdx.spaces.watching import clean_marks
from vhdx.units import MIB

if TYPE_CHECKING:
    from types import TracebackType
    from uuid import UUID

    from vhdx.spaces.core import Core
    from vhdx.spaces.state import Event

    StrPath = str | os.PathLike[str]

__all__ = ["DEFAULT_SLAB", "Pool"]

DEFAULT_SLAB = 256 * MIB


class Pool(SpacesOfPool, DisksOfPool):
    """An open pool of disks, and its spaces.

    Use :meth:`create` and :meth:`open`; a pool is a context manager. One process at a time has a pool
    open for changes. Methods may be called from any thread.

    Attributes:
        problems: for each path that is no disk of the pool why not.
    """

    def __init__(self, core: Core, problems: dict[str, VhdxError]) -> None:
        SpacesOfPool.__init__(self, core)
        DisksOfPool.__init__(self, core, self._detached)
        self.problems = problems
        self._closed = False

    # ---- the beginning and the end ----

    @classmethod
    @uninterruptible
    def create(
        cls,
        name: str,
        disks: Sequence[DiskSpec],
        *,
        slab: int = DEFAULT_SLAB,
        retire: RetirePolicy = RetirePolicy.ALWAYS,
        retire_seconds: float = 300.0,
        force: bool = False,
        known: bool = True,
    ) -> Pool:
        """Makes a pool; the content of its disks is lost.

        Args:
            name: of the pool.
            disks: at least one; files that are made, or files and block devices that are there.
            slab: bytes, a power of two from 64 KiB to 16 GiB: what is allocated at once on a disk.
            retire: what happens to disks that fail or are missing.
            retire_seconds: how long one may be away before that.
            force: use disks that hold data or belong to a pool.
            known: write a hint, so that the pool can be opened by its name.

        Raises:
            InvalidArgumentError, ExistsError, NoSpaceError, HostIOError: as the message says. Files
                that were made are removed then.
        """
        if known and any(hint.name == name for hint in hints.hints()):
            raise ExistsError(
                f"there is a pool {name!r} already", hint="vhdx pool list shows it; take another name"
            )
        core = make_core(
            name, disks, slab=slab, retire=retire, retire_seconds=retire_seconds, force=force
        )
        pool = cls._begin(core, {})
        try:
            if known:
                pool.remember()
        except BaseException:
            pool.close()
            raise
        return pool

    @classmethod
    def _begin(cls, core: Core, problems: dict[str, VhdxError]) -> Pool:
        try:
            return cls(core, problems)
        except BaseException:
            _let_go(core)
            raise

    @classmethod
    @uninterruptible
    def open(
        cls,
        name: str | None = None,
        mode: str = "r+",
        *,
        disks: Iterable[StrPath] = (),
        known: bool = True,
    ) -> Pool:
        """Opens a pool by its name, or by its disks in any order.

        Args:
            name: of the pool; None: the disks say it.
            mode: "r+", or "r" to change nothing.
            disks: paths; when none is given, those that were noted last.
            known: note where the disks are now.

        Raises:
            NotFoundError: nothing is known of a pool of this name.
            HostIOError: reason NO_QUORUM: half of its disks or more are missing.
            InUseError: another process has it.
            DamagedError, InvalidArgumentError: the disks are not those of one pool.
        """
        if mode not in {"r", "r+"}:
            raise InvalidArgumentError(f"the mode is {mode!r}", hint='use "r" or "r+"')
        paths = [os.fspath(path) for path in disks]
        identity = None
        if not paths:
            if name is None:
                raise InvalidArgumentError("a pool is opened by its name or by its disks")
            hint = hints.find_hint(name)
            paths, identity = hint.disks, hint.pool
        core, problems = open_core(paths, write=mode == "r+", pool=identity)
        if name is not None and core.state.settings.name != name:
            found = core.state.settings.name
            _let_go(core)
            raise InvalidArgumentError(f"these are the disks of pool {found!r}, not {name!r}")
        pool = cls._begin(core, problems)
        if known and mode == "r+":
            with contextlib.suppress(VhdxError):
                pool.remember()
        return pool

    @uninterruptible
    def close(self) -> None:
        """Ends repairs, makes everything durable, and closes the disks.

        Raises:
            InUseError: a space is in use.
            VhdxError: something could not be made durable; the pool is closed nevertheless.
        """
        core = self._core
        if self._closed:
            return
        with core.lock:
            if self.leases.names() and core.broken is None:
                names = ", ".join(self.leases.names())
                raise InUseError(f"spaces are in use: {names}", path=self.name)
            self._closed = True
        self._stop()
        try:
            if not core.read_only and core.broken is None:
                for space in core.spaces.values():
                    clean_marks(core, space, sorted(space.state.marks), is_closing=True)
                    space.layout.flush()
        finally:
            if not core.read_only:
                core.ledger.close()
            _let_go(core)

    def abandon(self) -> None:
        """Ends repairs and closes the disks as they are, as the end of the process would."""
        self._closed = True
        self._stop()
        _let_go(self._core)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @uninterruptible
    def rename(self, name: str) -> None:
        """Gives the pool another name, here and on its disks.

        Raises:
            InvalidArgumentError: it is no name for a pool.
            ExistsError: another pool that is known here has it.
            InUseError: a space is in use.
        """
        core, before = self._core, self.name
        with core.lock:
            core.check()
            check_name(name, "a pool")
            if any(hint.name == name and hint.pool != self.id for hint in hints.hints()):
                raise ExistsError(f"there is a pool {name!r} already", hint="take another name")
            if self.leases.names():
                raise InUseError("a pool that is in use keeps its name", path=before)
            settings = replace(core.state.settings, name=name)
            core.commit([core.state.pool_record(settings), core.event("pool-renamed", name, before)])
            for index, physical in core.disks.items():  # what labels say is only for people
                with contextlib.suppress(VhdxError):
                    physical.write_label(pool_name=name, disk_name=core.state.disks[index].name)
        self.remember()
        if name != before:
            hints.forget_hint(before)

    # ---- what it is ----

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._core.state.settings.name

    @property
    def id(self) -> UUID:
        """The pool's UUID."""
        return self._core.state.settings.id

    @property
    def read_only(self) -> bool:
        """Whether it is open for reading only."""
        return self._core.read_only

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """Calls ``listener`` with every event from now on, with the pool's lock held."""
        self._core.listeners.append(listener)


def _let_go(core: Core) -> None:
    """Closes spaces and disks as they are."""
    for space in core.spaces.values():
        space.layout.close()
    for physical in core.disks.values():
        physical.close()
