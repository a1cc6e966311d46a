# SPDX-License-Identifier: MIT
"""Simulated disks, the scheduler of a shared device, and load generators for experiments.

They wrap ``csrc/sim`` (``model.h``, ``delay.h``, ``load.h``) and ``csrc/qos/schedule.h``.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import ClosedError, HostIOError, InvalidArgumentError, Reason
from vhdx.plane import failures
from vhdx.plane._native import ffi, lib
from vhdx.plane.device import Device, Operation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from vhdx.plane.device import Pool
    from vhdx.plane.pacing import Clock, Meter

__all__ = [
    "DEEPEST",
    "LARGEST_WEIGHT",
    "PIECE",
    "Delay",
    "Load",
    "LoadFacts",
    "Model",
    "ModelKind",
    "Scheduled",
    "Scheduler",
    "SchedulerFacts",
    "Share",
    "ShareFacts",
]

DEEPEST: int = lib.VX_DEEPEST
"""The largest number of slots of a scheduler."""

LARGEST_WEIGHT: int = lib.VX_LARGEST_WEIGHT
PIECE: int = lib.VX_PIECE
"""The largest piece of a read or write, in bytes; each piece of a request needs a slot."""

_LEAST_UNIT, _LARGEST_UNIT = 512, 1 << 30
_LARGEST_CAPACITY = 1 << 60
_CALIBRATION = 2000


def _made(handle: Any) -> Any:
    if handle == ffi.NULL:
        raise HostIOError("the host is out of memory", reason=Reason.NO_MEMORY)
    return handle


def _clock_of(pool: Pool, clock: Clock | None) -> Any:
    return lib.vx_pool_clock(pool.handle) if clock is None else clock.handle


class ModelKind(IntEnum):
    """The kind of disk that is modelled; the values are those of ``vx_model_kind``."""

    HDD = lib.VX_MODEL_HDD
    SSD = lib.VX_MODEL_SSD
    NVME = lib.VX_MODEL_NVME


class Model:
    """A model of the service times of a disk; ``csrc/sim/model.h`` has the formulas and sources.

    Args:
        kind: the kind of disk.
        capacity: bytes, at least 1 MiB; larger offsets wrap around.
        write_cache: writes complete when they are in the memory of the disk.
    """

    def __init__(self, kind: ModelKind, capacity: int, *, write_cache: bool = False) -> None:
        if not 1 << 20 <= capacity <= _LARGEST_CAPACITY:
            raise InvalidArgumentError(
                f"a disk of {capacity} bytes cannot be modelled", hint="choose 1 MiB or more"
            )
        self.kind, self.capacity, self.write_cache = kind, capacity, write_cache
        self.handle = ffi.gc(
            _made(lib.vx_model_create(kind, capacity, write_cache)), lib.vx_model_destroy
        )

    def serve(self, operation: Operation, offset: int, length: int, now: int) -> int:
        """The completion time of a request that arrives at ``now``; both in ns of any one clock."""
        return int(lib.vx_model_serve(self.handle, operation, offset, length, now))

    def worst(self, length: int, others: int = 0) -> float:
        """The worst-case seconds for which a request of up to ``length`` bytes takes the device."""
        operations = (Operation.READ, Operation.WRITE)
        return max(lib.vx_model_worst(self.handle, o, length, others) for o in operations) / 1e9

    def capacity_iops(self, depth: int, length: int = 8192) -> float:
        """Random reads of ``length`` bytes a second, with ``depth`` always in flight."""
        copy = Model(self.kind, self.capacity, write_cache=self.write_cache)
        chosen = random.Random(1)  # noqa: S311
        places = max(1, self.capacity // length)
        ends = [0] * depth
        for _ in range(_CALIBRATION):
            place = chosen.randrange(places) * length
            done = copy.serve(Operation.READ, place, length, ends[0])
            heapq.heapreplace(ends, done)
        return _CALIBRATION / (max(ends) / 1e9)


class Delay(Device):
    """A device that does the I/O at once, but completes a request only when its model says so.

    Args:
        lower: does the I/O.
        model: the model; several devices may share one.
        pool: its clock is used if ``clock`` is None.
        base: the offset in bytes at which this disk begins on the modelled disk.
        clock: a virtual clock; requests then complete as it is advanced.
    """

    def __init__(
        self, lower: Device, model: Model, pool: Pool, *, base: int = 0, clock: Clock | None = None
    ) -> None:
        handle = lib.vx_delay_create(
            lower.handle, model.handle, _clock_of(pool, clock), base, failures.new_identity()
        )
        super().__init__(handle, lower.path)
        self._keep = (lower, model, pool, clock)


class SchedulerFacts(NamedTuple):
    """Totals while requests waited because every slot was taken, and the present counts."""

    contended_ns: int
    contended_units: int
    waiting: int
    below: int


class Scheduler:
    """Sends at most ``depth`` requests at a time to a device, in an order that keeps reservations.

    Args:
        pool: runs requests that may block; its clock is used if ``clock`` is None.
        unit: bytes of a normalised unit, 512 to 1 GiB.
        depth: the number of slots, 1 to DEEPEST.
        model: a model of the device; weights then share its time, otherwise normalised units.
        clock: a virtual clock.
    """

    def __init__(
        self,
        pool: Pool,
        unit: int,
        depth: int,
        *,
        model: Model | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not 1 <= depth <= DEEPEST:
            raise InvalidArgumentError(f"a depth of {depth}", hint=f"choose 1 to {DEEPEST}")
        if not _LEAST_UNIT <= unit <= _LARGEST_UNIT:
            raise InvalidArgumentError(
                f"units of {unit} bytes", hint=f"choose {_LEAST_UNIT} to {_LARGEST_UNIT}"
            )
        self.depth, self.piece = depth, max(PIECE // unit, 1) * unit
        handle = lib.vx_scheduler_create(
            _clock_of(pool, clock),
            pool.handle,
            unit,
            depth,
            ffi.NULL if model is None else model.handle,
        )
        self.handle = ffi.gc(_made(handle), lib.vx_scheduler_release)
        self._keep = (pool, model, clock)
        self._process = os.getpid()

    def set_most_below(self, seconds: float | None) -> None:
        """Bounds the worst-case time of the pieces in flight; one piece may always go.

        Args:
            seconds: the bound, by the model; None is no bound.
        """
        ns = (1 << 64) - 1 if seconds is None else round(seconds * 1e9)
        lib.vx_scheduler_set_most_below(self.handle, ns)

    def stop(self) -> None:
        """Cancels all present and later waits for slots; call it before the pool is closed."""
        if self._process == os.getpid():  # a forked child has no waiting requests
            lib.vx_scheduler_stop(self.handle)

    def read(self) -> SchedulerFacts:
        """Reads the counts since its creation; must not be called after its pool is closed."""
        found = ffi.new("vx_scheduler_facts *")
        lib.vx_scheduler_read(self.handle, found)
        return SchedulerFacts(*(getattr(found, name) for name in SchedulerFacts._fields))


class ShareFacts(NamedTuple):
    """The requests that a share was served so far, and those that wait in it now."""

    requests: int
    units: int
    reserved_units: int
    waiting: int
    waiting_units: int
    waited_ns: int
    below: int
    late_ns: int


class Share:
    """A client of a scheduler: a disk, a group of disks, or background work."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.handle = _made(lib.vx_share_create(scheduler.handle))  # freed with the scheduler
        self._keep = scheduler

    def set(self, *, reservation: int = 0, limit: int = 0, weight: int = 100) -> None:
        """Sets reservation, limit and weight from now on.

        Args:
            reservation: units a second that are served first; 0 is none.
            limit: the most units a second, reservation included; 0 is no limit.
            weight: its relative share by weight, 1 to LARGEST_WEIGHT.
        """
        if not 1 <= weight <= LARGEST_WEIGHT or min(reservation, limit) < 0:
            raise InvalidArgumentError(
                f"a share of weight {weight}, {reservation} to {limit} units a second",
                hint=f"choose a weight from 1 to {LARGEST_WEIGHT}, and units from 0",
            )
        lib.vx_share_set(self.handle, reservation, limit, weight)

    def read(self) -> ShareFacts:
        """Reads the counts since its creation."""
        found = ffi.new("vx_share_facts *")
        lib.vx_share_read(self.handle, found)
        return ShareFacts(*(getattr(found, name) for name in ShareFacts._fields))

    @contextlib.contextmanager
    def slot(self, size: int) -> Iterator[None]:
        """Holds a slot for work that does its own I/O of ``size`` bytes, at most one piece.

        Raises:
            ClosedError: the scheduler has stopped.
        """
        taken = lib.vx_share_take_slot(self.handle, size)
        if taken == ffi.NULL:
            raise ClosedError("the scheduler has stopped")
        try:
            yield
        finally:
            lib.vx_slot_end(taken)


class Scheduled(Device):
    """A disk whose requests wait in a share for slots of the scheduler."""

    def __init__(self, lower: Device, share: Share) -> None:
        handle = lib.vx_schedule_create(lower.handle, share.handle, 0)
        super().__init__(handle, lower.path)
        self._keep = (lower, share)

    def set_share(self, share: Share) -> None:
        """Sets the share in which new requests wait; it must be of the same scheduler."""
        lib.vx_schedule_set_share(self.handle, share.handle)

    def waiting(self) -> int:
        """The number of its requests that wait for a slot."""
        return lib.vx_schedule_waiting(self.handle)


class LoadFacts(NamedTuple):
    """The numbers of requests answered so far, of those that failed, and of those in flight."""

    answered: int
    failed: int
    under_way: int


class Load:
    """A client that keeps ``depth`` requests in flight, for experiments and benchmarks.

    Args:
        device: the device to load; with a virtual clock it must take time (a :class:`Delay` below).
        pool: runs requests that may block; its clock is used if ``clock`` is None.
        length: bytes of a request, up to 32 MiB.
        depth: 1 to 1024; ``depth`` times ``length`` is at most 256 MiB.
        span: the load uses this many bytes from the start of the device; None uses all.
        write_percent: the percentage of requests that are writes.
        least: request sizes are ``length``, half of it and so on, down to this; None: ``length``.
        pause: seconds from a completion to the next request.
        flushes: a flush follows each write, before the next request.
        in_a_row: requests are sequential, otherwise random.
        seed: the seed of the random choices.
        meter: counts the requests.
        clock: a virtual clock; then :meth:`Clock.advance` runs the load.
    """

    def __init__(
        self,
        device: Device,
        pool: Pool,
        *,
        length: int,
        depth: int,
        span: int | None = None,
        write_percent: int = 0,
        least: int | None = None,
        flushes: bool = False,
        pause: float = 0.0,
        in_a_row: bool = False,
        seed: int = 1,
        meter: Meter | None = None,
        clock: Clock | None = None,
    ) -> None:
        terms = ffi.new("vx_load_terms *")
        terms.span = device.size if span is None else span
        terms.length, terms.depth, terms.seed = length, depth, seed
        terms.write_percent, terms.in_a_row = write_percent, in_a_row
        terms.least, terms.flushes = least or 0, flushes
        terms.pause_ns = round(pause * 1e9)
        handle = lib.vx_load_create(
            device.handle, _clock_of(pool, clock), pool.handle,
            ffi.NULL if meter is None else meter.handle, terms,
        )  # fmt: skip
        if handle == ffi.NULL:
            raise InvalidArgumentError(
                f"{depth} requests of {length} bytes in {terms.span}", hint="see vhdx.plane.Load"
            )
        self.handle = ffi.gc(handle, lib.vx_load_destroy)
        self._keep = (device, pool, meter, clock)

    def start(self) -> None:
        """Sends the first requests."""
        lib.vx_load_start(self.handle)

    def stop(self) -> None:
        """Sends no new requests; with a real clock, waits until none is in flight."""
        lib.vx_load_stop(self.handle)

    def read(self) -> LoadFacts:
        """Reads the counts since its creation."""
        found = ffi.new("vx_load_facts *")
        lib.vx_load_read(self.handle, found)
        return LoadFacts(found.answered, found.failed, found.under_way)
