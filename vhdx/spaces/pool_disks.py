# SPDX-License-Identifier: MIT
"""What a pool does with disks, and repairs: a part of :class:`vhdx.Pool`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vhdx.errors import VhdxError
from vhdx.interrupts import uninterruptible
from vhdx.spaces import disk_changes, hints, space_changes
from vhdx.spaces.disks import DiskSpec, absolute
from vhdx.spaces.repairing import Repairer
from vhdx.spaces.reports import PoolReport, report_of
from vhdx.spaces.scrubbing import Scrubbed, scrub
from vhdx.spaces.states import Usage
from vhdx.spaces.watching import Watcher

if TYPE_CHECKING:
    from vhdx.interrupts import Cancel, Progress
    from vhdx.spaces.core import Core

__all__ = ["DisksOfPool"]


class DisksOfPool:
    """The disks of an open pool, and their repair."""

    def __init__(self, core: Core, detached: dict[int, str]) -> None:
        self._core, self._detached = core, detached
        self._repairer: Repairer | None = None
        self._watcher: Watcher | None = None
        if not core.read_only:
            self._repairer = Repairer(core)
            self._watcher = Watcher(core, self._repairer, detached)
            self._repairer.begin()
            self._watcher.begin()

    def _stop(self) -> None:
        """Ends what goes on in the background."""
        for part in (self._watcher, self._repairer):
            if part is not None:
                part.close()

    def report(self) -> PoolReport:
        """Its disks, spaces, health, jobs and events."""
        return report_of(self._core, self._repairer, self._watcher, self._detached)

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
        """Looks after the disks, and waits until the repairs that are possible are done.

        Returns:
            False if that takes longer.
        """
        if self._watcher is not None and self._repairer is not None:
            self._watcher.look()
            with self._core.lock:
                self._repairer.try_again()
        return self._repairer is None or self._repairer.wait(seconds)

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
