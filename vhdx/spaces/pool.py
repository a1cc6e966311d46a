# SPDX-License-Identifier: MIT
"""Pools of disks: implements :class:`vhdx.Pool`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from vhdx import place, plane
from vhdx.errors import (
    ExistsError,
    InUseError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    VhdxError,
)
from vhdx.interrupts import uninterruptible
from vhdx.ledger import Ledger
from vhdx.spaces import hints
from vhdx.spaces.core import Core
from vhdx.spaces.disks import DiskSpec, PhysicalDisk, absolute, check_name
from vhdx.spaces.opening import attach_spaces, open_core
from vhdx.spaces.repairing import Repairer
from vhdx.spaces.reports import PoolReport, report_of
from vhdx.spaces.scrubbing import Scrubbed, scrub
from vhdx.spaces.space import LARGEST_SPACE, Space
from vhdx.spaces.state import NONE, PoolSettings, PoolState, SpaceState
from vhdx.spaces.states import MediaType, Provisioning, Resiliency, RetirePolicy, Usage
from vhdx.spaces.watching import Watcher, clean_marks
from vhdx.units import KIB, MIB, format_size

if TYPE_CHECKING:
    from types import TracebackType

    from vhdx.interrupts import Cancel, Progress
    from vhdx.spaces.state import Event, Owner

    StrPath = str | os.PathLike[str]

__all__ = ["DEFAULT_INTERLEAVE", "DEFAULT_SLAB", "Pool"]

DEFAULT_SLAB = 256 * MIB
DEFAULT_INTERLEAVE = 256 * KIB
_LEAST_SLAB, _LARGEST_SLAB = 64 * KIB, 1 << 34
_MOST_SPACES = 4096
_MOST_COLUMNS = {Resiliency.SIMPLE: 8, Resiliency.MIRROR: 4}  # of automatic choice


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
        check_name(name, "a pool")
        _check_slab(slab)
        _check_specs(disks)
        if known and any(hint.name == name for hint in hints.hints()):
            raise ExistsError(
                f"there is a pool {name!r} already", hint="vhdx pool list shows it; take another name"
            )
        settings = PoolSettings(uuid4(), name, slab, retire, retire_seconds)
        opened: list[PhysicalDisk] = []
        made = [os.fspath(spec.path) for spec in disks if spec.size is not None]
        existing = [path for path in made if place.of(path).exists(place.spelled(path))]
        try:
            opened.extend(
                PhysicalDisk.prepare(spec, pool=settings.id, pool_name=name, slab=slab, force=force)
                for spec in disks
            )
            core = _first_core(settings, disks, opened)
        except BaseException:
            for physical in opened:
                physical.close()
            for path in set(made) - set(existing):
                with contextlib.suppress(OSError):
                    place.of(path).remove(place.spelled(path))
            raise
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
        check_name(name, "a space")
        core = self._core
        with core.lock:
            core.check()
            if core.state.space_named(name) is not None:
                raise ExistsError(f"there is a space {name!r} already", path=self.name)
            space = SpaceState(
                number=max(core.state.spaces, default=0) + 1,
                id=uuid4(),
                name=name,
                resiliency=resiliency,
                provisioning=provisioning,
                columns=0,
                copies=_copies(resiliency, copies),
                interleave=_checked_interleave(interleave, core.state.settings.slab),
                size=_checked_size(size),
                has_volume=has_volume,
                media=media,
            )
            space.columns = self._columns(space, columns)
            records = [core.state.space_record(space), core.event("space-created", name, name)]
            core.commit(records)
            try:
                if provisioning is Provisioning.FIXED:
                    self._allocate_all(core.state.spaces[space.number])
            except BaseException:
                core.commit([core.state.space_gone_record(space.number)])
                raise
            Space(core, core.state.spaces[space.number], after_crash=False)

    def _allocate_all(self, space: SpaceState) -> None:
        core = self._core
        rows = [int(r) for r in range(len(space.rows))]
        members = core.allocate(space, rows)
        try:
            core.commit(list(core.state.rows_records(space, 0, members)))
        except NoSpaceError:
            for member in members[members["state"] != NONE]:
                core.slabs.release(int(member["disk"]), int(member["slab"]))
            raise

    def _columns(self, space: SpaceState, wanted: int | None) -> int:
        """The number of columns, checked against the disks."""
        core = self._core
        usable = [
            disk
            for disk in core.state.disks.values()
            if core.usable(disk.index)
            and disk.usage is Usage.AUTO_SELECT
            and space.media in {MediaType.UNSPECIFIED, disk.media}
        ]
        most = len(usable) // space.copies
        kind = "simple space" if space.copies == 1 else f"mirror of {space.copies} copies"
        if wanted is None:
            # A mirror leaves a disk out, so that there is room to rebuild another one.
            spared = len(usable) - (1 if space.copies > 1 else 0)
            wanted = max(1, min(spared // space.copies, _MOST_COLUMNS[space.resiliency]))
        if not 1 <= wanted <= plane.MOST_COLUMNS:
            raise InvalidArgumentError(f"a space has 1 to {plane.MOST_COLUMNS} columns")
        if wanted > most:
            needed = wanted * space.copies
            raise InvalidArgumentError(
                f"a {kind} with {wanted} columns needs {needed} disks, and {len(usable)} can be used",
                path=self.name,
                hint=f"add {needed - len(usable)} disks"
                + (f", or use {most} columns" if most else ""),
            )
        return wanted

    @uninterruptible
    def delete_space(self, name: str) -> None:
        """Deletes a space and what it holds.

        Raises:
            NotFoundError: there is none of this name.
            InUseError: it is in use.
        """
        core = self._core
        with core.lock:
            core.check()
            space = self._space(name)
            if self._leases.get(space.number):
                raise InUseError(f"space {name!r} is in use", path=self.name)
            core.commit(
                [
                    core.state.space_gone_record(space.number),
                    core.event("space-deleted", name, name),
                ]
            )
            attached = core.spaces.pop(space.number, None)
            if attached is not None:
                attached.layout.close()
            self._detached.pop(space.number, None)
            for member in space.rows[space.rows["state"] != NONE]:
                index, slab = int(member["disk"]), int(member["slab"])
                core.slabs.release(index, slab)
                if core.usable(index):
                    core.give_back_space(index, slab)

    @uninterruptible
    def resize_space(self, name: str, size: int) -> None:
        """Makes a space larger, while it is used.

        Raises:
            InvalidArgumentError: it would become smaller.
            NoSpaceError: a fixed space does not fit into the pool; nothing was changed.
        """
        core = self._core
        with core.lock:
            core.check()
            space = self._space(name)
            if _checked_size(size) < space.size:
                raise InvalidArgumentError(
                    f"space {name!r} has {space.size} bytes, and cannot become smaller",
                    path=self.name,
                )
            larger = replace(space, size=size)
            first = len(space.rows)
            records = [core.state.space_record(larger)]
            count = larger.row_count(core.state.settings.slab) - first
            if count > 0 and space.provisioning is Provisioning.FIXED:
                members = core.allocate(space, range(first, first + count))
                records += core.state.rows_records(space, first, members)
            core.commit(records)
            attached = core.spaces.get(space.number)
            if attached is not None:
                attached.grow()

    def has_volume(self, name: str) -> bool:
        """Whether the space holds a volume; else it is a raw disk.

        Raises:
            NotFoundError: there is no such space.
        """
        return self._space(name).has_volume

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
            space = self._space(name)
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

    def _space(self, name: str) -> SpaceState:
        space = self._core.state.space_named(name)
        if space is None:
            names = ", ".join(self.space_names()) or "none"
            raise NotFoundError(f"there is no space {name!r}; there are: {names}", path=self.name)
        return space

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
        self._retire_now()
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

    def _retire_now(self) -> None:
        core = self._core
        with core.lock:
            core.check()
            if core.state.settings.retire is RetirePolicy.NEVER:
                return
            for disk in list(core.state.disks.values()):
                if disk.out is not None and not disk.out.retired:
                    out = replace(disk.out, retired=True)
                    core.commit(
                        [
                            core.state.disk_record(replace(disk, out=out)),
                            core.event("disk-retired", "a repair was asked for", disk.name),
                        ]
                    )

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
            states = core.state.spaces.values() if name is None else [self._space(name)]
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
        core = self._core
        with core.lock:
            core.check()
            if core.state.disk_named(spec.name) is not None:
                raise ExistsError(f"there is a disk {spec.name!r} already", path=self.name)
            settings = core.state.settings
            index = next((i for i in range(plane.MOST_DISKS) if i not in core.state.disks), None)
            if index is None:
                raise InvalidArgumentError(f"a pool has at most {plane.MOST_DISKS} disks")
            physical = PhysicalDisk.prepare(
                spec, pool=settings.id, pool_name=settings.name, slab=settings.slab, force=force
            )
            try:
                physical.write_first_label()
                disk = physical.state(index, spec)
                core.change_members(
                    lambda parts: core.ledger.add(physical.member, parts),
                    [core.state.disk_record(disk), core.event("disk-added", spec.name, spec.name)],
                )
            except BaseException:
                physical.close()
                raise
            core.disks[index] = physical
            core.slabs.add_disk(index)
            core.refresh_all()
            if self._repairer is not None:
                self._repairer.try_again()
        with contextlib.suppress(VhdxError):
            self.remember()

    @uninterruptible
    def set_usage(self, name: str, usage: Usage) -> None:
        """Changes the usage of a disk; a retired one is emptied by the next repair."""
        core = self._core
        with core.lock:
            core.check()
            disk = self._disk(name)
            core.commit(
                [
                    core.state.disk_record(replace(core.state.disks[disk], usage=usage)),
                    core.event("disk-usage", usage.word, name),
                ]
            )
            if self._repairer is not None:
                self._repairer.try_again()

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
        core, repairer = self._core, self._repairer
        with core.lock:
            core.check()
            index = self._disk(name)
            if len(core.state.disks) == 1:
                raise InvalidArgumentError("it is the last disk of the pool", path=self.name)
            disk = core.state.disks[index]
            core.commit(
                [
                    core.state.disk_record(replace(disk, removing=True)),
                    core.event("disk-removing", name, name),
                ]
            )
            total = core.slabs.used(index)
        assert repairer is not None
        try:
            while True:
                is_settled = repairer.wait(0.3)
                left = core.slabs.used(index)
                if progress is not None:
                    progress(total - left, max(total, 1))
                if left == 0:
                    break
                if cancel is not None and cancel():
                    raise VhdxError("the removal was stopped", path=self.name)
                if is_settled:
                    why = "; ".join(sorted(set(repairer.refused().values()))) or "they cannot move"
                    raise NoSpaceError(
                        f"{left} slabs of disk {name!r} have nowhere to go: {why}", path=self.name
                    )
        except BaseException:
            with core.lock, contextlib.suppress(VhdxError):
                now = core.state.disks[index]
                core.commit([core.state.disk_record(replace(now, removing=False))])
            raise
        self._take_away(index)

    def _take_away(self, index: int) -> None:
        """Ends the membership of a disk that is empty."""
        core = self._core
        with core.lock:
            disk = core.state.disks[index]
            core.change_members(
                lambda parts: core.ledger.remove(disk.id, parts),
                [core.state.disk_gone_record(index), core.event("disk-removed", disk.name)],
            )
            for space in core.spaces.values():
                space.forget_disk(index)
            core.slabs.remove_disk(index)
            physical = core.disks.pop(index, None)
            if physical is not None:
                with contextlib.suppress(VhdxError):
                    physical.write_label(pool_name=self.name, disk_name=disk.name, has_left=True)
                physical.close()
        with contextlib.suppress(VhdxError):
            self.remember()

    def _disk(self, name: str) -> int:
        disk = self._core.state.disk_named(name)
        if disk is None:
            names = ", ".join(d.name for d in self._core.state.disks.values())
            raise NotFoundError(f"there is no disk {name!r}; there are: {names}", path=self.name)
        return disk.index


def _first_core(
    settings: PoolSettings, specs: Sequence[DiskSpec], opened: Sequence[PhysicalDisk]
) -> Core:
    """Writes ledger and labels of a new pool."""
    state = PoolState(settings)
    records = [state.pool_record()]
    for index, (spec, physical) in enumerate(zip(specs, opened, strict=True)):
        records.append(state.disk_record(physical.state(index, spec)))
    for record in records:
        state.apply(*record)
    members = [physical.member for physical in opened]
    names = [physical.id for physical in opened]
    pool = plane.shared_pool(plane.Level.SPACE)
    ledger = Ledger.create(members, pool, identity=settings.id, names=names)
    ledger.checkpoint(records)
    for physical in opened:  # last: without labels nobody finds a pool
        physical.write_first_label()
    core = Core(state, ledger, dict(enumerate(opened)))
    with core.lock:
        core.commit([core.event("pool-created", settings.name)])
    return core


def _close_disks(core: Core) -> None:
    for physical in core.disks.values():
        physical.close()


def _check_slab(slab: int) -> None:
    if not _LEAST_SLAB <= slab <= _LARGEST_SLAB or slab & (slab - 1):
        raise InvalidArgumentError(
            f"a slab of {slab} bytes is impossible",
            hint=f"use a power of two from {format_size(_LEAST_SLAB)} to "
            f"{format_size(_LARGEST_SLAB)}",
        )


def _check_specs(disks: Sequence[DiskSpec]) -> None:
    if not 1 <= len(disks) <= plane.MOST_DISKS - 8:
        raise InvalidArgumentError(f"a pool has 1 to {plane.MOST_DISKS - 8} disks")
    names = [spec.name for spec in disks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidArgumentError(f"two disks are named {twice[0]!r}")
    paths = [place.real(spec.path) for spec in disks]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise InvalidArgumentError(f"two disks have the path {twice[0]}")


def _copies(resiliency: Resiliency, copies: int | None) -> int:
    if resiliency is Resiliency.SIMPLE:
        if copies not in {None, 1}:
            raise InvalidArgumentError("a simple space has one copy")
        return 1
    if copies is None:
        return 2
    if copies not in {2, 3}:
        raise InvalidArgumentError("a mirror has 2 or 3 copies")
    return copies


def _checked_interleave(interleave: int | None, slab: int) -> int:
    if interleave is None:
        return min(DEFAULT_INTERLEAVE, slab)
    if interleave < 4096 or interleave > slab or interleave & (interleave - 1):
        raise InvalidArgumentError(
            f"an interleave of {interleave} bytes is impossible",
            hint=f"use a power of two from 4 KiB to the slab, {format_size(slab)}",
        )
    return interleave


def _checked_size(size: int) -> int:
    if size <= 0 or size % 4096 or size > LARGEST_SPACE:
        raise InvalidArgumentError(
            f"a space of {size} bytes is impossible",
            hint=f"use a multiple of 4096 up to {format_size(LARGEST_SPACE)}",
        )
    return size
