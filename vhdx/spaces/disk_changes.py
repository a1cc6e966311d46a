# SPDX-License-Identifier: MIT
"""Adds, retires and removes disks of an open pool."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from vhdx import plane
from vhdx.errors import (
    ExistsError,
    InUseError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    Reason,
    VhdxError,
)
from vhdx.interrupts import Cancel, Progress
from vhdx.spaces.core import Core
from vhdx.spaces.disks import DiskSpec, PhysicalDisk
from vhdx.spaces.repairing import Repairer
from vhdx.spaces.states import RetirePolicy, Usage

__all__ = ["add", "remove", "retire_now", "set_usage"]


def _find(core: Core, name: str) -> int:
    disk = core.state.disk_named(name)
    if disk is None:
        names = ", ".join(each.name for each in core.state.disks.values())
        raise NotFoundError(
            f"there is no disk {name!r}; there are: {names}", path=core.state.settings.name
        )
    return disk.index


def add(core: Core, spec: DiskSpec, *, force: bool) -> None:
    """Adds a disk; see :meth:`vhdx.spaces.Pool.add_disk`."""
    with core.lock:
        core.check()
        settings = core.state.settings
        if core.state.disk_named(spec.name) is not None:
            raise ExistsError(f"there is a disk {spec.name!r} already", path=settings.name)
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


def set_usage(core: Core, name: str, usage: Usage) -> None:
    """Changes the usage of a disk."""
    with core.lock:
        core.check()
        disk = core.state.disks[_find(core, name)]
        core.commit(
            [
                core.state.disk_record(replace(disk, usage=usage)),
                core.event("disk-usage", usage.word, name),
            ]
        )


def retire_now(core: Core) -> None:
    """Disks that are out are not waited for any more, unless the policy is NEVER."""
    with core.lock:
        core.check()
        if core.state.settings.retire is RetirePolicy.NEVER:
            return
        for disk in list(core.state.disks.values()):
            if disk.out is not None and not disk.out.retired:
                retired = replace(disk, out=replace(disk.out, retired=True))
                core.commit(
                    [
                        core.state.disk_record(retired),
                        core.event("disk-retired", "a repair was asked for", disk.name),
                    ]
                )


def remove(
    core: Core,
    repairer: Repairer,
    name: str,
    progress: Progress | None,
    cancel: Cancel | None,
) -> None:
    """Empties a disk and takes it out; see :meth:`vhdx.spaces.Pool.remove_disk`."""
    with core.lock:
        core.check()
        index = _find(core, name)
        pool = core.state.settings.name
        if len(core.state.disks) == 1:
            raise InvalidArgumentError("it is the last disk of the pool", path=pool)
        disk = core.state.disks[index]
        if index in core.removals:
            raise InUseError(f"disk {name!r} is being removed already", path=pool)
        core.removals.add(index)
    try:
        with core.lock:
            core.commit(
                [
                    core.state.disk_record(replace(disk, removing=True)),
                    core.event("disk-removing", name, name),
                ]
            )
        _empty(core, repairer, index, progress, cancel)
        _take_away(core, index)
    except BaseException:
        with core.lock, contextlib.suppress(VhdxError):
            now = core.state.disks.get(index)
            if now is not None:
                core.commit([core.state.disk_record(replace(now, removing=False))])
        raise
    finally:
        core.removals.discard(index)


def _empty(
    core: Core,
    repairer: Repairer,
    index: int,
    progress: Progress | None,
    cancel: Cancel | None,
) -> None:
    """Waits until the repairs have moved everything off the disk."""
    disk, pool = core.state.disks[index], core.state.settings.name
    with core.lock:
        repairer.try_again()
    total = core.slabs.used(index)
    while True:
        is_settled = repairer.wait(0.3)
        left = core.slabs.used(index)
        if progress is not None:
            progress(total - left, max(total, 1))
        if left == 0:
            return
        if cancel is not None and cancel():
            raise VhdxError("the removal was stopped", reason=Reason.CANCELLED, path=pool)
        if is_settled:
            why = "; ".join(sorted(set(repairer.refused().values()))) or "they cannot move"
            raise NoSpaceError(
                f"{left} slabs of disk {disk.name!r} have nowhere to go: {why}", path=pool
            )


def _take_away(core: Core, index: int) -> None:
    """Ends the membership of a disk that is empty."""
    with core.lock:
        disk, pool = core.state.disks[index], core.state.settings.name
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
                physical.write_label(pool_name=pool, disk_name=disk.name, has_left=True)
            physical.close()
