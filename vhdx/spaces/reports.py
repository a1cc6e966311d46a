# SPDX-License-Identifier: MIT
"""What people and programs see of a pool: states as Windows names them, and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.spaces.jobs import leaves_slabs
from vhdx.spaces.state import NONE, STALE, DiskState, Event, SpaceState
from vhdx.spaces.states import DiskStatus, Health, PoolStatus, SpaceStatus

if TYPE_CHECKING:
    from vhdx.spaces.core import Core
    from vhdx.spaces.repairing import Repairer
    from vhdx.spaces.watching import Watcher

__all__ = ["DiskReport", "PoolReport", "SpaceReport", "report_of"]


@dataclass(frozen=True)
class DiskReport:
    """A physical disk; sizes in bytes.

    Attributes:
        name, path, media, usage: as set.
        size: bytes.
        slabs, used_slabs: counts.
        status: OperationalStatus.
        health: HealthStatus.
        reason: what happened to it, or None.
    """

    name: str
    path: str
    media: str
    usage: str
    size: int
    slabs: int
    used_slabs: int
    status: str
    health: str
    reason: str | None = None


@dataclass(frozen=True)
class SpaceReport:
    """A space; sizes in bytes.

    Attributes:
        name, resiliency, provisioning, columns, copies, interleave: as set.
        size: bytes.
        allocated: bytes of the size that have slabs.
        footprint: bytes of the pool that it takes.
        status: OperationalStatus.
        health: HealthStatus.
        attached: it can be read and written.
        detached_reason: why not, or None.
        stale_slabs: copies that wait for a repair.
        unreconciled_rows: rows that are compared since a crash.
    """

    name: str
    resiliency: str
    provisioning: str
    columns: int
    copies: int
    interleave: int
    size: int
    allocated: int
    footprint: int
    status: str
    health: str
    attached: bool
    detached_reason: str | None
    stale_slabs: int
    unreconciled_rows: int
    has_volume: bool


@dataclass(frozen=True)
class PoolReport:
    """A pool; sizes in bytes.

    Attributes:
        name, id: of the pool.
        slab: bytes.
        size, allocated: bytes of all its disks without hot spares, and of slabs in use.
        status: OperationalStatus.
        health: HealthStatus.
        read_only_reason: why it cannot be changed, or None.
        jobs: slabs that wait for a repair, by kind.
        refused: why some of them cannot be done now.
        disks, spaces: in the order in which they were made.
        events: the newest, oldest first.
    """

    name: str
    id: str
    slab: int
    size: int
    allocated: int
    status: str
    health: str
    read_only_reason: str | None
    jobs: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    disks: list[DiskReport] = field(default_factory=list)
    spaces: list[SpaceReport] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def disk_status(core: Core, disk: DiskState, watcher: Watcher | None) -> DiskStatus:
    """The OperationalStatus of a disk."""
    if disk.out is not None:
        return disk.out.status
    if disk.removing:
        return DiskStatus.REMOVING
    if watcher is not None and watcher.is_slow(disk.index):
        return DiskStatus.ABNORMAL_LATENCY
    stale = any(
        ((space.rows["disk"] == disk.index) & (space.rows["state"] == STALE)).any()
        for space in core.state.spaces.values()
    )
    return DiskStatus.IN_SERVICE if stale else DiskStatus.OK


def space_status(core: Core, space: SpaceState) -> SpaceStatus:
    """The OperationalStatus of a space.

    Degraded: a copy is stale, or misses changes on a disk that is out. Incomplete: disks are out, and
    what they hold is still current. In service: a repair or reconciliation is under way.
    """
    attached = core.spaces.get(space.number)
    if attached is None:
        return SpaceStatus.DETACHED
    rows = space.rows
    found = core.entries(space, 0, len(rows))
    stored = (rows["state"] != NONE).any(axis=2)
    out = [index for index, disk in core.state.disks.items() if disk.out is not None]
    is_out = np.isin(rows["disk"], out) & (rows["state"] != NONE)
    if ((found.readable & is_out).any(axis=2) & stored).any() or found.lost.any():
        return SpaceStatus.NO_REDUNDANCY
    stale = rows["state"] == STALE
    if is_out.any():
        behind = (is_out & space.marked(0, len(rows))[:, None, None]).any() or stale.any()
        return SpaceStatus.DEGRADED if behind else SpaceStatus.INCOMPLETE
    if stale.any() or attached.unreconciled.any() or attached.filling:
        return SpaceStatus.IN_SERVICE
    return SpaceStatus.OK


def _space_report(core: Core, space: SpaceState, why_detached: str | None) -> SpaceReport:
    slab = core.state.settings.slab
    status = space_status(core, space)
    attached = core.spaces.get(space.number)
    stored = int((space.rows["state"] != NONE).any(axis=(1, 2)).sum())
    return SpaceReport(
        name=space.name,
        resiliency=space.resiliency.word,
        provisioning=space.provisioning.word,
        columns=space.columns,
        copies=space.copies,
        interleave=space.interleave,
        size=space.size,
        allocated=min(space.size, stored * slab * space.columns),
        footprint=int((space.rows["state"] != NONE).sum()) * slab,
        status=status.text,
        health=status.health.word,
        attached=attached is not None,
        detached_reason=why_detached,
        stale_slabs=int((space.rows["state"] == STALE).sum()),
        unreconciled_rows=0 if attached is None else int(attached.unreconciled.sum()),
        has_volume=space.has_volume,
    )


def report_of(
    core: Core, repairer: Repairer | None, watcher: Watcher | None, detached: dict[int, str]
) -> PoolReport:
    """The report of a pool."""
    with core.lock:
        settings = core.state.settings
        disks = []
        for disk in core.state.disks.values():
            status = disk_status(core, disk, watcher)
            retires = " (retired)" if leaves_slabs(disk) and disk.out is not None else ""
            disks.append(
                DiskReport(
                    name=disk.name,
                    path=disk.path,
                    media=disk.media.word,
                    usage=disk.usage.word,
                    size=disk.size,
                    slabs=disk.slabs,
                    used_slabs=core.slabs.used(disk.index),
                    status=status.text,
                    health=status.health.word,
                    reason=None if disk.out is None else disk.out.text + retires,
                )
            )
        counted = [d for d in core.state.disks.values() if d.usage.word != "hot-spare"]
        pool_status = PoolStatus.OK
        if any(disk.out is not None for disk in core.state.disks.values()):
            pool_status = PoolStatus.DEGRADED
        why = None
        if core.broken is not None:
            pool_status, why = PoolStatus.READ_ONLY, core.broken.message
        elif settings.read_only:
            pool_status, why = PoolStatus.READ_ONLY, "by policy"
        health = pool_status.health
        if core.broken is not None:
            health = Health.UNHEALTHY
        jobs: dict[str, int] = {}
        refused: list[str] = []
        if repairer is not None:
            for job in repairer.waiting():
                jobs[job.kind] = jobs.get(job.kind, 0) + 1
            refused = sorted(set(repairer.refused().values()))
        return PoolReport(
            name=settings.name,
            id=str(settings.id),
            slab=settings.slab,
            size=sum(disk.slabs for disk in counted) * settings.slab,
            allocated=sum(core.slabs.used(i) for i in core.state.disks) * settings.slab,
            status=pool_status.text,
            health=health.word,
            read_only_reason=why,
            jobs=jobs,
            refused=refused,
            disks=disks,
            spaces=[
                _space_report(core, space, detached.get(space.number))
                for space in core.state.spaces.values()
            ],
            events=list(core.state.events),
        )
