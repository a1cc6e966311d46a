# SPDX-License-Identifier: MIT
"""Makes a new pool: its disks, their ledger, and last their labels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from uuid import uuid4

from vhdx import place, plane
from vhdx.errors import InvalidArgumentError
from vhdx.ledger import Ledger
from vhdx.spaces.core import Core
from vhdx.spaces.disks import DiskSpec, PhysicalDisk, check_name
from vhdx.spaces.state import PoolSettings, PoolState
from vhdx.spaces.states import RetirePolicy
from vhdx.units import KIB, format_size

__all__ = ["check_distinct", "make_core"]

_LEAST_SLAB, _LARGEST_SLAB = 64 * KIB, 1 << 34
_MOST_DISKS = plane.MOST_DISKS - 8


def make_core(
    name: str,
    disks: Sequence[DiskSpec],
    *,
    slab: int,
    retire: RetirePolicy,
    retire_seconds: float,
    force: bool,
) -> Core:
    """Makes a pool; see :meth:`vhdx.spaces.Pool.create`."""
    check_name(name, "a pool")
    _check_slab(slab)
    _check_specs(disks)
    settings = PoolSettings(uuid4(), name, slab, retire, retire_seconds)
    opened: list[PhysicalDisk] = []
    made = [
        spec.path
        for spec in disks
        if spec.size is not None and not place.of(spec.path).exists(place.spelled(spec.path))
    ]
    try:
        opened.extend(
            PhysicalDisk.prepare(spec, pool=settings.id, pool_name=name, slab=slab, force=force)
            for spec in disks
        )
        return _first_core(settings, disks, opened)
    except BaseException:
        for physical in opened:
            physical.close()
        for path in made:
            with contextlib.suppress(OSError):
                place.of(path).remove(place.spelled(path))
        raise


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


def _check_slab(slab: int) -> None:
    if not _LEAST_SLAB <= slab <= _LARGEST_SLAB or slab & (slab - 1):
        raise InvalidArgumentError(
            f"a slab of {slab} bytes is impossible",
            hint=f"use a power of two from {format_size(_LEAST_SLAB)} to "
            f"{format_size(_LARGEST_SLAB)}",
        )


def _check_specs(disks: Sequence[DiskSpec]) -> None:
    if not 1 <= len(disks) <= _MOST_DISKS:
        raise InvalidArgumentError(f"a pool has 1 to {_MOST_DISKS} disks")
    check_distinct(disks)


def check_distinct(disks: Sequence[DiskSpec]) -> None:
    """Raises InvalidArgumentError if two of them have one name or one path."""
    names = [spec.name for spec in disks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidArgumentError(f"two disks are named {twice[0]!r}")
    paths = [place.real(spec.path) for spec in disks]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise InvalidArgumentError(f"two disks have the path {twice[0]}")
