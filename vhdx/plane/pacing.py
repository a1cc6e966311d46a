# SPDX-License-Identifier: MIT
"""Clocks, limits, throttles and meters.

They wrap ``csrc/core/clock.h``, ``csrc/core/meter.h`` and ``csrc/qos/throttle.h``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from vhdx.errors import HostIOError, InvalidArgumentError, Reason
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
"""The largest rate of a limit, in units or bytes a second; no device reaches it."""

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
    """A maximum rate, with burst and credit.

    Attributes:
        rate: units or bytes a second, 1 to LARGEST_RATE.
        burst: units or bytes that may pass at once, 0 to LARGEST_RATE.
        credit: units or bytes that an idle flow saves beyond the burst, 0 to LARGEST_RATE.
        credit_rate: largest rate a second while credit is spent; 0 is no bound.
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
                f"the credit rate of {self.credit_rate} is below the rate of {self.rate} a second",
                hint="choose at least the rate, or 0 for no bound",
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
        """The present time, nanoseconds."""
        return lib.vx_clock_now(self.handle)

    @property
    def next(self) -> int | None:
        """The time at which the next timer is due, nanoseconds; None if there is no timer."""
        when = lib.vx_clock_next(self.handle)
        return None if when == 2**64 - 1 else when

    def advance(self, until: int) -> None:
        """Advances to ``until`` (nanoseconds), and runs each due timer here at its own time."""
        lib.vx_clock_advance(self.handle, until)


class Pacing:
    """A set of limits and throttles that share a lock and a clock.

    Args:
        pool: runs delayed requests that may block; its clock is used if ``clock`` is None.
        clock: a virtual clock.
    """

    def __init__(self, pool: Pool, clock: Clock | None = None) -> None:
        real = lib.vx_pool_clock(pool.handle)
        handle = _made(lib.vx_qos_create(real if clock is None else clock.handle, pool.handle))
        process = os.getpid()

        def destroy(handle: Any) -> None:
            if os.getpid() == process:  # in a forked child, its locks may be held forever
                lib.vx_qos_destroy(handle)

        self.handle = ffi.gc(handle, destroy)
        self.pool = pool
        self._keep = clock


class Limits:
    """A set of limits that one or several throttles share.

    Args:
        pacing: the pacing that the limits belong to.
        unit: bytes of a normalised unit, 512 to 1 GiB.
    """

    def __init__(self, pacing: Pacing, unit: int) -> None:
        self.handle = _made(lib.vx_limits_create(pacing.handle, unit))  # freed with the pacing
        self._keep = pacing

    def set(self, limits: Mapping[LimitKind, Limit], *, fresh: bool = False) -> None:
        """Replaces all limits; saved credit and debt stay, and waiting requests are retimed.

        Args:
            limits: limits by kind; a kind that is missing is not limited.
            fresh: new limits start with full burst and credit.
        """
        wanted = ffi.new("vx_limit[]", lib.VX_LIMIT_KINDS)
        for kind, limit in limits.items():
            mine = wanted[kind]
            mine.rate, mine.burst = limit.rate, limit.burst
            mine.credit, mine.credit_rate = limit.credit, limit.credit_rate
        lib.vx_limits_set(self.handle, wanted, fresh)

    def levels(self) -> dict[LimitKind, int]:
        """Units or bytes that each kind could admit now; negative is debt, 0 if not limited."""
        levels = ffi.new("int64_t[]", lib.VX_LIMIT_KINDS)
        lib.vx_limits_levels(self.handle, levels)
        return {kind: levels[kind] for kind in LimitKind}


class Throttle(Device):
    """A flow: the requests of one initiator to one disk, delayed so that limits are met.

    Args:
        lower: the device that requests go to.
        pacing: the pacing that the limits belong to.
        own: limits of the disk.
        group: limits shared with other disks.
    """

    def __init__(
        self, lower: Device, pacing: Pacing, own: Limits, group: Limits | None = None
    ) -> None:
        handle = lib.vx_throttle_create(lower.handle, pacing.handle, own.handle, 0)
        super().__init__(handle, lower.path)
        self._pacing = (lower, pacing, own)
        self.set_group(group)

    def set_group(self, group: Limits | None) -> None:
        """Sets the group limits that apply, from now on, in addition to those of the disk."""
        lib.vx_throttle_set_group(self.handle, ffi.NULL if group is None else group.handle)

    def waiting(self) -> tuple[int, int]:
        """The number of waiting requests, and the units that they will cost."""
        numbers = ffi.new("uint64_t[2]")
        lib.vx_throttle_waiting(self.handle, numbers, numbers + 1)
        return numbers[0], numbers[1]


class MeterFacts(NamedTuple):
    """The counts of a meter; each pair is reads, then all operations that change data."""

    requests: tuple[int, int]
    units: tuple[int, int]
    bytes: tuple[int, int]
    latency_ns: tuple[int, int]
    queued_ns: tuple[int, int]
    offered: tuple[int, int]
    bins: tuple[int, ...]

    def numbers(self) -> list[int]:
        """All METER_NUMBERS counts in one list; lists of several flows can be added."""
        return [number for pair in self[:6] for number in pair] + list(self.bins)


class Meter:
    """Counts the requests of a connection and their latencies; initially off.

    Args:
        unit: bytes of a normalised unit.
    """

    def __init__(self, unit: int) -> None:
        self.handle = ffi.gc(_made(lib.vx_meter_create(unit)), lib.vx_meter_destroy)

    def switch(self, *, on: bool) -> None:
        """Turns counting on or off."""
        lib.vx_meter_switch(self.handle, on)

    def read(self) -> MeterFacts:
        """Reads the counts; each number is exact, but they are not read at the same instant."""
        found = ffi.new("vx_meter_facts *")
        lib.vx_meter_read(self.handle, found)
        return MeterFacts(*(tuple(getattr(found, name)) for name in MeterFacts._fields))


def quantile(bins: Sequence[int], share: float) -> int:
    """The latency (ns) that ``share`` (0 to 1) of requests did not exceed; 0 without requests."""
    wanted = share * sum(bins)
    if not wanted:
        return 0
    seen = 0
    for bin_, count in enumerate(bins):
        seen += count
        if seen >= wanted:
            return int(lib.vx_meter_bin_start(bin_ + 1))
    return int(lib.vx_meter_bin_start(_BINS))
