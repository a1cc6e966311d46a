# SPDX-License-Identifier: MIT
"""Whether a modelled device can keep a set of minimums in the worst case; arithmetic only.

The promise. A client that always has ``depth`` reads or writes under way gets its minimum,
whatever its requests are and whatever other clients do. With a depth of 1 it does one thing at a
time, and a flush after each write may be among them.

The argument. The scheduler serves the earliest deadline first. A reservation of r units a second
has one unit, of at most C seconds of the device, in each T = 1 / r. Take one such unit, and let t0
be the last moment at which something less urgent was started. Everything that was under way at t0
is done by t0 + B. In any L seconds from t0 on, what is at least as urgent takes no more than
sum(floor(L / Tj) * Cj). So the unit is late by at most

    f(L) = B + sum(floor(L / Tj) * Cj) - L     for some L >= T

(non-preemptive earliest deadline first: Jeffay, Stanat, Martel 1991). A client with n requests
under way asks for its next unit in time if its units are late by no more than (n - 1) * T. One
that flushes does if they are early by what a flush takes; on a hard disk a flush waits for what is
under way, which is B again.

B is what ``depth`` pieces of the largest size take: the first one alone, the second beside one
other, and so on. C may count on n - 1 others where every client has at least n requests under way.
A shallow scheduler has a small B; a deep one has more requests to choose from.
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
"""Of the device: a tenth is for what nobody has reserved."""

_MOST_LATE = 0.4  # seconds; the scheduler takes half a second for too much work
_MOST_POINTS = 200_000


class Load(NamedTuple):
    """What a device takes for pieces, in seconds, by how many others are under way.

    Attributes:
        unit: for a request of one normalised unit.
        piece: for the largest one that goes at a time.
        pace: work in the background takes one such piece in so many seconds.
        flush_waits: for everything that is below; else it takes no time.
    """

    unit: Callable[[int], float]
    piece: Callable[[int], float]
    pace: float
    flush_waits: bool


class Verdict(NamedTuple):
    """Of a set of minimums at a depth.

    Attributes:
        depth: that was asked about.
        capacity: units a second, in the worst case.
        blocking: seconds for which everything below takes.
        kept: whether every minimum is kept.
        used: share of the device that is reserved.
    """

    depth: int
    capacity: float
    blocking: float
    kept: bool
    used: float


def evaluate(
    reservations: Sequence[Reservation], depth: int, load: Load, blocking: float = 0.0
) -> Verdict:
    """Whether all of them are kept with so many below at a time, or as many as take ``blocking``."""
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
    # Beyond it f, which is at most blocking - (1 - used) * L, is below every slack.
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
    """The deepest at which all are kept; where there is none, ``most`` as it is."""
    for depth in range(most, 0, -1):
        found = evaluate(reservations, depth, load)
        if found.kept:
            return found
    shallow = evaluate(reservations, 1, load)
    asked = evaluate(reservations, most, load)
    return asked if asked.capacity > shallow.capacity else shallow


def most_below(reservations: Sequence[Reservation], most: int, load: Load) -> float | None:
    """Seconds of work that may be under way so that all are kept; None where they cannot be."""
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
    """The highest sum of minimums in these proportions that is kept, at most the one they have.

    0: no minimum of such clients is kept.
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
