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
from vhdx.ledger import Ledger, Recovered
from vhdx.spaces.core import Core
from vhdx.spaces.disks import PhysicalDisk, open_all
from vhdx.spaces.returning import status_of, take_back
from vhdx.spaces.space import Space
from vhdx.spaces.state import NONE, DiskState, Out, PoolState
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
        opened = _open_ledger(chosen, errors, write=write)
        core = opened
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
    physical = {label.disk: (file, label) for file, label in chosen}
    disks = {label.disk: PhysicalDisk(file, label, None) for file, label in chosen}
    members = [disk.member for disk in disks.values()]
    name = chosen[0][1].pool_name
    recovered: Recovered | None = None
    try:
        if write:
            pool = plane.shared_pool(plane.Level.SPACE)
            recovered = Ledger.recover(members, pool, identity=chosen[0][1].pool)
            records = recovered.records
        else:
            records = Ledger.read(members, identity=chosen[0][1].pool)
    except HostIOError as error:
        if error.reason is Reason.NO_QUORUM:
            raise HostIOError(
                f"pool {name!r} has no quorum: {error.message}",
                reason=Reason.NO_QUORUM,
                hint="bring back missing disks, or name them with --disks (disks=)",
            ) from error
        raise
    state = PoolState.from_records(records)
    by_id = {disk.id: disk for disk in state.disks.values()}
    present: dict[int, PhysicalDisk] = {}
    for identity, disk in disks.items():
        known = by_id.get(identity)
        if known is None:
            errors[disk.path] = DamagedError("it is no disk of the pool any more", path=disk.path)
            continue
        file, label = physical[identity]
        present[known.index] = PhysicalDisk(file, label, known.latency)
        present[known.index].found_modified = disk.found_modified  # before the recovery
    core = Core(state, None if recovered is None else recovered.ledger, {})
    if recovered is None:
        _judge_for_reading(core, present)
    else:
        _judge(core, present, recovered, errors)
    return core


def _why_missing(disk: DiskState, errors: dict[str, VhdxError]) -> tuple[DiskStatus, str]:
    error = errors.get(disk.path)
    if error is None:
        return DiskStatus.LOST_COMMUNICATION, "it is missing"
    return status_of(error.message), error.message


def _judge(
    core: Core,
    present: dict[int, PhysicalDisk],
    recovered: Recovered,
    errors: dict[str, VhdxError],
) -> None:
    """Decides which disks take part; durable."""
    state = core.state
    with core.lock:
        core.disks.update({i: p for i, p in present.items() if state.disks[i].out is None})
        for index, disk in list(state.disks.items()):
            physical = present.get(index)
            if physical is None and disk.out is None:
                status, text = _why_missing(disk, errors)
                core.take_out(index, status, text, position=recovered.base)
            elif physical is not None and disk.out is None and disk.id in recovered.missed:
                core.disks.pop(index, None)
                core.take_out(
                    index,
                    DiskStatus.STALE_METADATA,
                    "it lacks changes that the others have: it was away, or is an old copy",
                    all_stale=True,
                )
        for index, physical in present.items():
            disk = state.disks[index]
            if disk.out is not None:
                position = recovered.positions.get(disk.id)
                if disk.id in recovered.missed and disk.out.status is DiskStatus.STALE_METADATA:
                    position = None
                if not take_back(core, index, physical, position, rejoins=False):
                    errors[physical.path] = DamagedError(
                        "it is an old copy of a disk that has the only copy of some data",
                        path=physical.path,
                        hint="bring the newest one",
                    )


def _judge_for_reading(core: Core, present: dict[int, PhysicalDisk]) -> None:
    """Disks that are out or missing are not read; nothing is recorded."""
    state = core.state
    for index, disk in list(state.disks.items()):
        if index in present and disk.out is None:
            core.disks[index] = present[index]
        elif disk.out is None:
            now = int(time.time() * 1000)
            since = state.event_number + 1
            out = Out(since, DiskStatus.LOST_COMMUNICATION, "it is missing", 0, 0, time=now)
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
                (space.rows["state"] == NONE).all(axis=(1, 2)).any()
            )
            if unfinished and not core.read_only:
                core.commit([core.state.space_gone_record(number)])  # its creation was cut off
                core.slabs = type(core.slabs)(core.state)
                continue
            lost = core.entries(space, 0, len(space.rows)).lost
            if lost.any():
                detached[number] = f"{int(lost.any(axis=1).sum())} of {len(lost)} rows have no copy"
                continue
            Space(core, space, after_crash=True)
    return detached
