# SPDX-License-Identifier: MIT
"""Finds the disks of a pool, recovers its ledger, and decides which disks take part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from vhdx import plane
from vhdx.errors import DamagedError, HostIOError, InvalidArgumentError, Reason, VhdxError
from vhdx.ledger import Ledger, Record, Recovered
from vhdx.ledger.members import look
from vhdx.spaces.core import Core
from vhdx.spaces.disks import PhysicalDisk, open_all
from vhdx.spaces.returning import status_of, take_back
from vhdx.spaces.space import Space
from vhdx.spaces.state import NONE, DiskState, Event, Out, PoolState
from vhdx.spaces.states import DiskStatus, Provisioning

if TYPE_CHECKING:
    from vhdx.place import ImageFile
    from vhdx.spaces.label import Label

__all__ = ["attach_spaces", "open_core"]


def open_core(
    paths: Iterable[str | os.PathLike[str]], *, write: bool, pool: UUID | None = None
) -> tuple[Core, dict[str, VhdxError]]:
    """Opens a pool by paths of its disks, in any order.

    Args:
        paths: of disks; those of other pools are refused.
        write: for changes.
        pool: the UUID that it must have; any if None.

    Returns:
        The core, without attached spaces; and for each path that is no disk of it why not.

    Raises:
        HostIOError: reason NO_QUORUM: half of its disks or more are missing.
        DamagedError: no disk of a pool is there, or its metadata is damaged.
        InvalidArgumentError: the disks belong to several pools.
        InUseError: another process has a disk.
    """
    found, errors = open_all(paths, write=write)
    kept: list[ImageFile] = [file for file, _ in found]
    try:
        chosen = _of_one_pool(found, errors, pool)
        core = _open_ledger(chosen, errors, write=write)
        kept = []
    finally:
        for file in kept:
            file.close()
    used = {id(physical.file) for physical in core.disks.values()}
    for file, _ in found:
        if id(file) not in used:
            file.close()
    return core, errors


def _of_one_pool(
    found: Sequence[tuple[ImageFile, Label]], errors: dict[str, VhdxError], pool: UUID | None
) -> list[tuple[ImageFile, Label]]:
    chosen: list[tuple[ImageFile, Label]] = []
    for file, label in found:
        if label.has_left:
            errors[file.path] = DamagedError("it left its pool", path=file.path)
        elif pool is not None and label.pool != pool:
            errors[file.path] = InvalidArgumentError(
                f"it is disk {label.disk_name!r} of another pool, {label.pool_name!r}", path=file.path
            )
        else:
            chosen.append((file, label))
    if not chosen:
        for error in errors.values():
            raise error
        raise InvalidArgumentError("no disk was named")
    pools = {label.pool: label.pool_name for _, label in chosen}
    if len(pools) > 1:
        names = " and ".join(f"{name!r}" for name in pools.values())
        raise InvalidArgumentError(f"the disks belong to {len(pools)} pools: {names}")
    seen: dict[UUID, ImageFile] = {}
    for file, label in chosen:
        other = seen.setdefault(label.disk, file)
        if other is not file:
            raise DamagedError(
                f"{other.path} and {file.path} are both disk {label.disk_name!r} of pool "
                f"{label.pool_name!r}: one is a copy",
                hint="leave the copy away",
            )
    return chosen


def _open_ledger(
    chosen: Sequence[tuple[ImageFile, Label]], errors: dict[str, VhdxError], *, write: bool
) -> Core:
    disks = {label.disk: PhysicalDisk(file, label, None) for file, label in chosen}
    members = [disk.member for disk in disks.values()]
    name, identity = chosen[0][1].pool_name, chosen[0][1].pool
    recovered: Recovered | None = None
    missed: list[UUID] = []
    try:
        if write:
            pool = plane.shared_pool(plane.Level.SPACE)
            judge = _Judge(set(disks), errors)
            recovered = Ledger.recover(members, pool, identity=identity, amend=judge.amend)
            state = judge.state
        else:
            records, missed = look(members, identity)
            state = PoolState.from_records(records)
    except HostIOError as error:
        if error.reason is Reason.NO_QUORUM:
            raise HostIOError(
                f"pool {name!r} has no quorum: {error.message}",
                reason=Reason.NO_QUORUM,
                hint="bring back missing disks, or name them with --disks (disks=)",
            ) from error
        raise
    assert state is not None
    by_id = {disk.id: disk for disk in state.disks.values()}
    present: dict[int, PhysicalDisk] = {}
    for identity, disk in disks.items():
        known = by_id.get(identity)
        if known is None:
            errors[disk.path] = DamagedError("it no longer belongs to the pool", path=disk.path)
            continue
        present[known.index] = disk
        disk.set_latency(known.latency)
    core = Core(state, None if recovered is None else recovered.ledger, {})
    if recovered is None:
        _judge_for_reading(core, present, missed)
    else:
        _take_part(core, present, recovered, errors)
    return core


class _Judge:
    """Says in what a recovery writes which disks are out: a crash cannot forget it then.

    Args:
        present: the disks that are there.
        errors: why others could not be opened, by path.

    Attributes:
        state: with that.
    """

    def __init__(self, present: set[UUID], errors: dict[str, VhdxError]) -> None:
        self._present, self._errors = present, errors
        self.state: PoolState | None = None

    def amend(
        self,
        records: list[Record],
        missed: list[UUID],
        base: tuple[int, int],
        nothing_written: bool,
    ) -> list[Record]:
        state = self.state = PoolState.from_records(records)
        for disk in list(state.disks.values()):
            if disk.out is not None or (disk.id in self._present and disk.id not in missed):
                continue
            if disk.id in missed:
                status = DiskStatus.STALE_METADATA
                text = "it lacks changes that the others have: it was away, or is an old copy"
            else:
                status, text = _why_missing(disk, self._errors)
            now = int(time.time() * 1000)
            since = state.event_number + 1
            is_lost = disk.id in missed and not nothing_written
            out = Out(since, status, text, *base, all_stale=is_lost, time=now)
            event = Event(since, now, "disk-out", f"{status.text}: {text}", disk.name)
            state.apply(*state.disk_record(replace(disk, out=out)))
            state.apply(*state.event_record(event))
        return list(state.records())


def _why_missing(disk: DiskState, errors: dict[str, VhdxError]) -> tuple[DiskStatus, str]:
    error = errors.get(disk.path)
    if error is None:
        return DiskStatus.LOST_COMMUNICATION, "it is missing"
    return status_of(error.message), error.message


def _take_part(
    core: Core,
    present: dict[int, PhysicalDisk],
    recovered: Recovered,
    errors: dict[str, VhdxError],
) -> None:
    """Lets the disks take part that do, and takes back those that were out."""
    state = core.state
    with core.lock:
        core.disks.update({i: p for i, p in present.items() if state.disks[i].out is None})
        outside = set(recovered.ledger.out_of_step)
        names = recovered.ledger.members
        waiting = [index for index in present if state.disks[index].out is not None]
        while waiting:  # one that was taken back may have what another one lacks
            refused = []
            for index in waiting:
                identity = state.disks[index].id
                position = recovered.positions.get(identity)
                rejoins = identity in names and names.index(identity) in outside
                try:
                    if not take_back(core, index, present[index], position, rejoins=rejoins):
                        refused.append(index)
                except VhdxError as error:  # it stays out; only a broken pool does not open
                    core.check()
                    errors[present[index].path] = error
            if refused == waiting:
                break
            waiting = refused
        # From now on data may change without a commit. A disk that lacks this one is an old copy.
        core.commit([state.pool_record()])
        for index in waiting:
            errors[present[index].path] = DamagedError(
                "it is an old copy of a disk that has the only copy of some data",
                path=present[index].path,
                hint="bring the newest one",
            )


def _judge_for_reading(core: Core, present: dict[int, PhysicalDisk], missed: Sequence[UUID]) -> None:
    """Disks that are out, missing or old are not read; nothing is recorded."""
    state = core.state
    for index, disk in list(state.disks.items()):
        if index in present and disk.out is None and disk.id not in missed:
            core.disks[index] = present[index]
        elif disk.out is None:
            now = int(time.time() * 1000)
            since = state.event_number + 1
            status = DiskStatus.LOST_COMMUNICATION
            text = "it is missing"
            if index in present:
                status, text = DiskStatus.STALE_METADATA, "it lacks changes that the others have"
            out = Out(since, status, text, 0, 0, time=now)
            state.disks[index] = replace(disk, out=out)


def attach_spaces(core: Core) -> dict[int, str]:
    """Attaches every space that can be read as a whole.

    Returns:
        For each space that stays detached why, by number.
    """
    detached: dict[int, str] = {}
    with core.lock:
        for number, space in list(core.state.spaces.items()):
            unfinished = space.provisioning is Provisioning.FIXED and bool(
                (space.rows["state"] == NONE).all()
            )
            if unfinished and not core.read_only:
                core.commit([core.state.space_gone_record(number)])  # its creation was cut off
                core.slabs = type(core.slabs)(core.state)
                continue
            detached[number] = ""
        attach_detached(core, detached)
    return detached


def attach_detached(core: Core, detached: dict[int, str]) -> None:
    """Attaches those of the detached spaces that can be read as a whole now; under the lock.

    Args:
        core: of the pool.
        detached: why, by number of the space; it is changed.
    """
    for number in list(detached):
        space = core.state.spaces[number]
        lost = core.entries(space, 0, len(space.rows)).lost
        if lost.any():
            detached[number] = f"{int(lost.any(axis=1).sum())} of {len(lost)} rows have no copy"
            continue
        Space(core, space, after_crash=True)
        del detached[number]
