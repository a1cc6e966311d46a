# SPDX-License-Identifier: MIT
"""Checks whether a modelled device can keep a set of minimums in the worst case.

The module has no state and does no I/O.

The guarantee. A client that always has ``depth`` reads or writes in flight gets its minimum,
whatever its requests are and whatever other clients do. A client with a depth of 1 has one request
in flight at a time, and may send a flush after each write.

The proof. The scheduler serves the earliest deadline first. A reservation of r units a second
consists of one unit in each period T = 1 / r, and a unit takes the device for at most C seconds.
Take one such unit, and let t0 be the last moment at which a less urgent request was started. All
requests in flight at t0 are done by t0 + B. In the L seconds after t0, units that are at least as
urgent take no more than sum(floor(L / Tj) * Cj). So the unit is late by at most

    f(L) = B + sum(floor(L / Tj) * Cj) - L     for some L >= T

(non-preemptive earliest deadline first: Jeffay, Stanat, Martel 1991). A client with n requests in
flight sends its next unit in time if its units are late by no more than (n - 1) * T. A client that
flushes sends it in time if its units are done earlier than that by the duration of a flush. On a hard
disk a flush waits for all requests in flight, which takes B.

B is the time that ``depth`` pieces of the largest size take: the first with no other in flight, the
second with one other, and so on. Where every client has at least n requests in flight, C is the
time of a unit with n - 1 others in flight. A smaller depth makes B smaller; a larger depth gives
the device more requests to choose from, so C is smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vhdx.arrays import np
from vhdx.qos.reservations import Reservation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Seconds = np.ndarray[Any, np.dtype[np.float64]]


__all__ = ["USABLE", "Load", "Verdict", "best_depth", "evaluate", "most_below", "most_together"]

USABLE = 0.9
"""The share of the device that can be reserved; a tenth is left for unreserved work."""

_MOST_LATE = 0.4  # seconds; when a deadline is missed by 0.5 s the scheduler assumes overload
_MOST_POINTS = 200_000


class Load(NamedTuple):
    """How many seconds a device takes for a piece, given the number of other pieces in flight.

    Attributes:
        unit: time of a request of one normalised unit.
        piece: time of a piece of the largest size.
        pace: seconds from one such piece of background work to the next.
        flush_waits: whether a flush waits for all requests in flight; otherwise it takes no time.
    """

    unit: Callable[[int], float]
    piece: Callable[[int], float]
    pace: float
    flush_waits: bool


class Verdict(NamedTuple):
    """The result of checking a set of minimums at one depth.

    Attributes:
        depth: the depth that was checked.
        capacity: units a second that the device serves in the worst case.
        blocking: seconds that the device takes for all pieces in flight (B).
        kept: whether every minimum is kept.
        used: share of the device that minimums and background work take.
    """

    depth: int
    capacity: float
    blocking: float
    kept: bool
    used: float


def evaluate(
    reservations: Sequence[Reservation], depth: int, load: Load, blocking: float = 0.0
) -> Verdict:
    """Checks minimums with ``depth`` pieces in flight, or ``blocking`` seconds of them if more."""
    fewest = min((each.depth for each in reservations), default=1)
    cost = load.unit(min(depth, fewest) - 1)
    blocking = max(blocking, sum(load.piece(others) for others in range(depth)))
    every = np.array([1 / each.iops for each in reservations] + [load.pace])
    costs = np.array([cost] * len(reservations) + [load.piece(0)])
    used = float((costs / every).sum())
    flush = blocking if load.flush_waits else 0.0
    slack = [
        min((each.depth - 1) / each.iops, _MOST_LATE) if each.depth > 1 else -flush
        for each in reservations
    ]
    kept = used <= USABLE and _in_time(every, costs, blocking, used, np.array([*slack, _MOST_LATE]))
    return Verdict(depth, 1 / cost, blocking, kept, used)


def _in_time(every: _Seconds, costs: _Seconds, blocking: float, used: float, slack: _Seconds) -> bool:
    if len(every) == 1:
        return True
    # Beyond `end` every f(L) is below every slack: f(L) <= blocking - (1 - used) * L.
    end = max((blocking - float(slack.min())) / (1 - used), float(every.max()))
    if (end / every).sum() > _MOST_POINTS:
        return bool(np.all(blocking - (1 - used) * every <= slack))
    points = np.unique(np.concatenate([t * np.arange(1, int(end / t) + 2) for t in every]))
    late = blocking - points
    for t, c in zip(every, costs, strict=True):
        late += c * np.floor(points / t + 1e-9)
    order = np.argsort(every)
    tightest = np.minimum.accumulate(slack[order])
    allowed = tightest[np.searchsorted(every[order], points + 1e-12, side="right") - 1]
    return bool(np.all(late <= np.where(points < every.min(), np.inf, allowed) + 1e-9))


def best_depth(reservations: Sequence[Reservation], most: int, load: Load) -> Verdict:
    """The verdict at the largest depth that keeps all minimums.

    When no depth does, the verdict is for ``most`` or 1, whichever has the higher capacity.
    """
    for depth in range(most, 0, -1):
        found = evaluate(reservations, depth, load)
        if found.kept:
            return found
    shallow = evaluate(reservations, 1, load)
    asked = evaluate(reservations, most, load)
    return asked if asked.capacity > shallow.capacity else shallow


def most_below(reservations: Sequence[Reservation], most: int, load: Load) -> float | None:
    """Seconds of work that may be in flight so that all minimums are kept; None if none works."""
    found = best_depth(reservations, most, load)
    low = found.blocking
    if not found.kept:
        return None
    high = max(low, sum(load.piece(others) for others in range(most)))
    if evaluate(reservations, found.depth, load, high).kept:
        return high
    for _ in range(12):
        middle = (low + high) / 2
        if evaluate(reservations, found.depth, load, middle).kept:
            low = middle
        else:
            high = middle
    return low


def most_together(reservations: Sequence[Reservation], most: int, load: Load) -> int:
    """The highest sum of minimums that can be kept when all are scaled down by one factor.

    0 when no minimum of clients with these depths can be kept.
    """
    whole = sum(each.iops for each in reservations)
    if whole == 0:
        return 0

    def scaled(total: int) -> list[Reservation]:
        return [Reservation(max(1, r.iops * total // whole), r.depth) for r in reservations]

    low, high = 0, whole + 1
    while high - low > 1:
        middle = (low + high) // 2
        if best_depth(scaled(middle), most, load).kept:
            low = middle
        else:
            high = middle
    return sum(each.iops for each in scaled(low)) if low else 0
