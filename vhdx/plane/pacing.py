# SPDX-License-Identifier: MIT
"""Time, limits, and what was done.

The faces of ``csrc/core/clock.h``, ``csrc/core/meter.h`` and ``csrc/qos/throttle.h``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import HostIOError, InvalidArgumentError, Reason
from vhdx.plane import failures
from vhdx.plane._native import ffi, lib
from vhdx.plane.device import Device, Pool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = [
    "LARGEST_RATE",
    "METER_NUMBERS",
    "Clock",
    "Limit",
    "LimitKind",
    "Limits",
    "Meter",
    "MeterFacts",
    "Pacing",
    "Throttle",
    "quantile",
]

LARGEST_RATE = 10**12
"""Units or bytes a second; more is no limit that anything could reach."""

_BINS: int = lib.VX_METER_BINS
METER_NUMBERS = 12 + _BINS


class LimitKind(IntEnum):
    """What is limited; the values are those of ``vx_limit_kind``."""

    UNITS = lib.VX_LIMIT_UNITS
    UNITS_READ = lib.VX_LIMIT_UNITS_READ
    UNITS_WRITTEN = lib.VX_LIMIT_UNITS_WRITTEN
    BYTES = lib.VX_LIMIT_BYTES
    BYTES_READ = lib.VX_LIMIT_BYTES_READ
    BYTES_WRITTEN = lib.VX_LIMIT_BYTES_WRITTEN


@dataclass(frozen=True)
class Limit:
    """A rate, with what may be saved while less is used.

    Attributes:
        rate: units or bytes a second, 1 to LARGEST_RATE.
        burst: units or bytes that may pass at once, 0 to LARGEST_RATE.
        credit: units or bytes that an idle flow saves beyond the burst, 0 to LARGEST_RATE.
        credit_rate: a second, at most, while credit is spent; 0 is no bound.
    """

    rate: int
    burst: int = 0
    credit: int = 0
    credit_rate: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rate", 1), ("burst", 0), ("credit", 0), ("credit_rate", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value <= LARGEST_RATE:
                raise InvalidArgumentError(
                    f"the {name.replace('_', ' ')} of a limit is {value}",
                    hint=f"choose {least} to {LARGEST_RATE}",
                )
        if self.credit_rate and self.credit_rate < self.rate:
            raise InvalidArgumentError(
                f"credit would be spent at {self.credit_rate} a second, the rate is {self.rate}",
                hint="choose more than the rate, or 0",
            )


def _made(handle: Any) -> Any:
    if handle == ffi.NULL:
        raise HostIOError("the host is out of memory", reason=Reason.NO_MEMORY)
    return handle


class Clock:
    """A clock whose time passes only when it is advanced; for tests and experiments."""

    def __init__(self) -> None:
        self.handle = ffi.gc(_made(lib.vx_clock_create(True)), lib.vx_clock_destroy)

    @property
    def now(self) -> int:
        """Nanoseconds."""
        return lib.vx_clock_now(self.handle)

    @property
    def next(self) -> int | None:
        """When the next timer is due, nanoseconds; None when there is none."""
        when = lib.vx_clock_next(self.handle)
        return None if when == 2**64 - 1 else when

    def advance(self, until: int) -> None:
        """To this time, nanoseconds; what is due happens on this thread, each at its own time."""
        lib.vx_clock_advance(self.handle, until)


class Pacing:
    """The limits and throttles that meet each other, and their time.

    Args:
        pool: runs what passes late and may block; its clock counts when ``clock`` is None.
        clock: a virtual one.
    """

    def __init__(self, pool: Pool, clock: Clock | None = None) -> None:
        real = lib.vx_pool_clock(pool.handle)
        handle = _made(lib.vx_qos_create(real if clock is None else clock.handle, pool.handle))
        process = os.getpid()

        def destroy(handle: Any) -> None:
            if os.getpid() == process:  # a thread that a child does not have may hold its locks
                lib.vx_qos_destroy(handle)

        self.handle = ffi.gc(handle, destroy)
        self.pool = pool
        self._keep = clock


class Limits:
    """A set of limits that one or several throttles share.

    Args:
        pacing: where it belongs.
        unit: bytes of a normalised unit, 512 to 1 GiB.
    """

    def __init__(self, pacing: Pacing, unit: int) -> None:
        self.handle = _made(lib.vx_limits_create(pacing.handle, unit))  # freed with the pacing
        self._keep = pacing

    def set(self, limits: Mapping[LimitKind, Limit], *, fresh: bool = False) -> None:
        """Replaces all limits, live: what was saved or is owed stays, what waits is timed anew.

        Args:
            limits: by kind; what is not named is not limited.
            fresh: limits that are new begin with all that they may save.
        """
        wanted = ffi.new("vx_limit[]", lib.VX_LIMIT_KINDS)
        for kind, limit in limits.items():
            mine = wanted[kind]
            mine.rate, mine.burst = limit.rate, limit.burst
            mine.credit, mine.credit_rate = limit.credit, limit.credit_rate
        lib.vx_limits_set(self.handle, wanted, fresh)

    def levels(self) -> dict[LimitKind, int]:
        """What each kind could let pass now; negative is owed, 0 where there is no limit."""
        levels = ffi.new("int64_t[]", lib.VX_LIMIT_KINDS)
        lib.vx_limits_levels(self.handle, levels)
        return {kind: levels[kind] for kind in LimitKind}


class Throttle(Device):
    """A flow: requests of one initiator to one disk, held up as limits want it.

    Args:
        lower: where requests go.
        own: limits of the disk.
        group: limits shared with other disks.
    """

    def __init__(
        self, lower: Device, pacing: Pacing, own: Limits, group: Limits | None = None
    ) -> None:
        handle = lib.vx_throttle_create(
            lower.handle, pacing.handle, own.handle, failures.new_identity()
        )
        super().__init__(handle, lower.path)
        self._pacing = (lower, pacing, own)
        self.set_group(group)

    def set_group(self, group: Limits | None) -> None:
        """Which group's limits count besides the disk's own, from now on."""
        lib.vx_throttle_set_group(self.handle, ffi.NULL if group is None else group.handle)

    def waiting(self) -> tuple[int, int]:
        """Requests that wait now, and the units that they will cost."""
        numbers = ffi.new("uint64_t[2]")
        lib.vx_throttle_waiting(self.handle, numbers, numbers + 1)
        return numbers[0], numbers[1]


class MeterFacts(NamedTuple):
    """What a flow did since its meter was made; pairs are of reads, and of all that changes."""

    requests: tuple[int, int]
    units: tuple[int, int]
    bytes: tuple[int, int]
    latency_ns: tuple[int, int]
    queued_ns: tuple[int, int]
    offered: tuple[int, int]
    bins: tuple[int, ...]

    def numbers(self) -> list[int]:
        """All of them, METER_NUMBERS; those of two flows can be added."""
        return [number for pair in self[:6] for number in pair] + list(self.bins)


class Meter:
    """Counts what a connection does, with latencies; off until it is switched on.

    Args:
        unit: bytes of a normalised unit.
    """

    def __init__(self, unit: int) -> None:
        self.handle = ffi.gc(_made(lib.vx_meter_create(unit)), lib.vx_meter_destroy)

    def switch(self, *, on: bool) -> None:
        """Whether it counts from now on."""
        lib.vx_meter_switch(self.handle, on)

    def read(self) -> MeterFacts:
        """Each number is exact, their relation is not."""
        found = ffi.new("vx_meter_facts *")
        lib.vx_meter_read(self.handle, found)
        return MeterFacts(*(tuple(getattr(found, name)) for name in MeterFacts._fields))


def quantile(bins: Sequence[int], share: float) -> int:
    """The latency, nanoseconds, that ``share`` (0 to 1) of requests did not exceed; 0 without any."""
    wanted = share * sum(bins)
    if not wanted:
        return 0
    seen = 0
    for bin_, count in enumerate(bins):
        seen += count
        if seen >= wanted:
            return int(lib.vx_meter_bin_start(bin_ + 1))
    return int(lib.vx_meter_bin_start(_BINS))
