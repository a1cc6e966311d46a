# SPDX-License-Identifier: MIT
"""Pools of disks: implements :class:`vhdx.Pool`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vhdx.errors import ExistsError, InUseError, InvalidArgumentError, VhdxError
from vhdx.interrupts import uninterruptible
from vhdx.spaces import disk_changes, hints, space_changes
from vhdx.spaces.disks import DiskSpec, absolute
from vhdx.spaces.making import make_core
from vhdx.spaces.opening import attach_spaces, open_core
from vhdx.spaces.repairing import Repairer
from vhdx.spaces.reports import PoolReport, report_of
from vhdx.spaces.scrubbing import Scrubbed, scrub
from vhdx.spaces.states import MediaType, Provisioning, Resiliency, RetirePolicy, Usage
from vhdx.spaces.watching import Watcher, clean_marks
from vhdx.units import MIB

if TYPE_CHECKING:
    from types import TracebackType
    from uuid import UUID

    from vhdx import plane
    from vhdx.interrupts import Cancel, Progress
    from vhdx.spaces.core import Core
    from vhdx.spaces.state import Event, Owner

    StrPath = str | os.PathLike[str]

__all__ = ["DEFAULT_SLAB", "Pool"]

DEFAULT_SLAB = 256 * MIB


class Pool:
    """An open pool of disks, and its spaces.

    Use :meth:`create` and :meth:`open`; a pool is a context manager. One process at a time has a pool
    open for changes. Methods may be called from any thread.

    Attributes:
        problems: for each path that is no disk of the pool why not.
    """

    def __init__(self, core: Core, problems: dict[str, VhdxError]) -> None:
        self._core = core
        self.problems = problems
        self._detached = attach_spaces(core)
        self._repairer: Repairer | None = None
        self._watcher: Watcher | None = None
        self._closed = False
        self._leases: dict[int, int] = {}  # spaces that are in use; under the core's lock
        if not core.read_only:
            self._repairer = Repairer(core)
            self._watcher = Watcher(core, self._repairer)
            self._repairer.begin()
            self._watcher.begin()

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
        pool = cls(core, {})
        if known:
            pool.remember()
        return pool

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
            _close_disks(core)
            raise InvalidArgumentError(f"these are the disks of pool {found!r}, not {name!r}")
        pool = cls(core, problems)
        if known and mode == "r+":
            with contextlib.suppress(VhdxError):
                pool.remember()
        return pool

    def remember(self) -> None:
        """Notes where the disks are, so that the pool can be opened by its name."""
        state = self._core.state
        paths = [
            self._core.disks[i].path if i in self._core.disks else disk.path
            for i, disk in state.disks.items()
        ]
        hint = hints.Hint(state.settings.name, state.settings.id, [absolute(path) for path in paths])
        hints.write_hint(hint)

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
            if self._leases and core.broken is None:
                names = ", ".join(core.state.spaces[n].name for n in self._leases)
                raise InUseError(f"spaces are in use: {names}", path=self.name)
            self._closed = True
        for part in (self._watcher, self._repairer):
            if part is not None:
                part.close()
        try:
            if not core.read_only and core.broken is None:
                for space in core.spaces.values():
                    clean_marks(core, space, sorted(space.state.marks))
                    space.layout.flush()
        finally:
            for space in core.spaces.values():
                space.layout.close()
            if not core.read_only:
                core.ledger.close()
            _close_disks(core)

    def abandon(self) -> None:
        """Ends repairs and closes the disks as they are, as the end of the process would."""
        self._closed = True
        for part in (self._watcher, self._repairer):
            if part is not None:
                part.close()
        for space in self._core.spaces.values():
            space.layout.close()
        _close_disks(self._core)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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

    def report(self) -> PoolReport:
        """Its disks, spaces, health, jobs and events."""
        return report_of(self._core, self._repairer, self._watcher, self._detached)

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """Calls ``listener`` with every event from now on, with the pool's lock held."""
        self._core.listeners.append(listener)

    # ---- spaces ----

    @uninterruptible
    def create_space(
        self,
        name: str,
        size: int,
        *,
        resiliency: Resiliency = Resiliency.MIRROR,
        copies: int | None = None,
        columns: int | None = None,
        interleave: int | None = None,
        provisioning: Provisioning = Provisioning.THIN,
        media: MediaType = MediaType.UNSPECIFIED,
        has_volume: bool = True,
    ) -> None:
        """Makes a space.

        Args:
            name: of the space; unique in the pool.
            size: bytes, a multiple of 4096.
            resiliency: simple or mirror.
            copies: of a mirror, 2 or 3; 2 when None.
            columns: over how many disks each copy is striped. When None as many as the disks allow,
                up to 8 (simple) or 4 (mirror), and for a mirror one disk is left for rebuilding.
            interleave: bytes on a column before the next one, a power of two; when None 256 KiB, or
                the slab if that is smaller.
            provisioning: thin takes slabs when they are written first, fixed takes all now.
            media: use only disks of this type.
            has_volume: it will hold a volume with files.

        Raises:
            InvalidArgumentError, ExistsError, NoSpaceError: as the message says.
        """
        space_changes.create(
            self._core,
            name,
            size,
            resiliency=resiliency,
            copies=copies,
            columns=columns,
            interleave=interleave,
            provisioning=provisioning,
            media=media,
            has_volume=has_volume,
        )

    @uninterruptible
    def delete_space(self, name: str) -> None:
        """Deletes a space and what it holds.

        Raises:
            NotFoundError: there is none of this name.
            InUseError: it is in use.
        """
        with self._core.lock:
            number = space_changes.find(self._core, name).number
            if self._leases.get(number):
                raise InUseError(f"space {name!r} is in use", path=self.name)
            space_changes.delete(self._core, name)
            self._detached.pop(number, None)

    @uninterruptible
    def resize_space(self, name: str, size: int) -> None:
        """Makes a space larger, while it is used.

        Raises:
            InvalidArgumentError: it would become smaller.
            NoSpaceError: a fixed space does not fit into the pool; nothing was changed.
        """
        space_changes.resize(self._core, name, size)

    def has_volume(self, name: str) -> bool:
        """Whether the space holds a volume; else it is a raw disk.

        Raises:
            NotFoundError: there is no such space.
        """
        return space_changes.find(self._core, name).has_volume

    def space_names(self) -> list[str]:
        """The names of all spaces."""
        return [space.name for space in self._core.state.spaces.values()]

    @contextlib.contextmanager
    def lease(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """Lends the device of a space; the pool is not closed meanwhile.

        Yields:
            The device (:class:`vhdx.plane.Device`).
        """
        number = self.take(name)
        try:
            yield self._core.spaces[number].layout
        finally:
            self.give_back(number)

    def take(self, name: str) -> int:
        """Begins to use a space; returns its number, for :meth:`device` and :meth:`give_back`."""
        core = self._core
        with core.lock:
            space = space_changes.find(self._core, name)
            if space.number not in core.spaces:
                why = self._detached.get(space.number, "it was detached")
                raise VhdxError(f"space {name!r} is detached: {why}", path=self.name)
            self._leases[space.number] = self._leases.get(space.number, 0) + 1
            return space.number

    def device(self, number: int) -> plane.Layout:
        """The device of a space that is in use."""
        return self._core.spaces[number].layout

    def attach_owner(self, number: int, owner: Owner) -> None:
        """Gives ``owner`` what it recorded for a space, and what it records from now on."""
        core = self._core
        with core.lock:
            kept = core.state.owners.get(number)
            for payload in () if kept is None else list(kept.records()):
                owner.apply(payload)
            core.state.owners[number] = owner

    def commit_owner(self, number: int, payloads: Iterable[bytes]) -> None:
        """Makes records of a space's owner durable, and applies them to it."""
        core = self._core
        with core.lock:
            core.commit([core.state.owner_record(number, payload) for payload in payloads])

    def give_back(self, number: int) -> None:
        """Ends a use of a space."""
        with self._core.lock:
            self._leases[number] -= 1
            if not self._leases[number]:
                del self._leases[number]

    # ---- repairs ----

    @uninterruptible
    def repair(
        self,
        *,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> PoolReport:
        """Repairs what can be repaired, and waits for that.

        Disks that failed or are missing are retired now, unless the policy is NEVER.

        Returns:
            The report afterwards; ``refused`` says what could not be done.
        """
        repairer = self._repairer
        if repairer is None:
            self._core.check()
            raise AssertionError("a pool that can be changed has a repairer")
        disk_changes.retire_now(self._core)
        with self._core.lock:
            total = len(repairer.waiting())
            repairer.try_again()
        while not repairer.wait(0.3):
            with self._core.lock:
                left = len(repairer.waiting())
            if progress is not None:
                progress(max(0, total - left), max(total, 1))
            if cancel is not None and cancel():
                break
        return self.report()

    @uninterruptible
    def scrub(
        self,
        name: str | None = None,
        *,
        repair: bool = False,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Scrubbed:
        """Compares the copies of mirrors.

        Args:
            name: of a space; all mirrors when None.
            repair: where most copies agree, make the others equal to them. Two copies that differ are
                only reported.
            progress, cancel: bytes compared; True stops.
        """
        core = self._core
        with core.lock:
            states = (
                core.state.spaces.values() if name is None else [space_changes.find(self._core, name)]
            )
            chosen = [core.spaces[s.number] for s in states if s.number in core.spaces]
        found = scrub(core, chosen, repair=repair, progress=progress, cancel=cancel)
        if not core.read_only:
            with core.lock, contextlib.suppress(VhdxError):
                core.commit([core.event("scrub", found.text)])
        return found

    @uninterruptible
    def settle(self, seconds: float = 60.0) -> bool:
        """Waits until the repairs that are possible are done; False if that takes longer."""
        return self._repairer is None or self._repairer.wait(seconds)

    @uninterruptible
    def look(self) -> None:
        """Looks after the disks now, and not only at the next moment for that."""
        if self._watcher is not None:
            self._watcher.look()

    # ---- disks ----

    @uninterruptible
    def add_disk(self, spec: DiskSpec, *, force: bool = False) -> None:
        """Adds a disk.

        Raises:
            InvalidArgumentError, ExistsError, NoSpaceError: as the message says.
        """
        disk_changes.add(self._core, spec, force=force)
        self._note_disks()

    @uninterruptible
    def set_usage(self, name: str, usage: Usage) -> None:
        """Changes the usage of a disk; a retired one is emptied by the next repair."""
        disk_changes.set_usage(self._core, name, usage)
        self._note_disks()

    @uninterruptible
    def remove_disk(
        self,
        name: str,
        *,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        """Moves everything off a disk, and takes it out of the pool.

        Raises:
            NoSpaceError: what is on it has nowhere to go; it stays, and is used as before.
            VhdxError: reason CANCELLED; it stays, and is used as before.
        """
        self._core.check()
        assert self._repairer is not None
        disk_changes.remove(self._core, self._repairer, name, progress, cancel)
        self._note_disks()

    def _note_disks(self) -> None:
        """After a change of the disks."""
        if self._repairer is not None:
            with self._core.lock:
                self._repairer.try_again()
        with contextlib.suppress(VhdxError):
            self.remember()


def _close_disks(core: Core) -> None:
    for physical in core.disks.values():
        physical.close()
