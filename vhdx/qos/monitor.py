# SPDX-License-Identifier: MIT
"""Computes figures over time windows, the status of disks, and alerts with hysteresis.

The module reads no clock to evaluate samples: each sample carries its time, so tests can simulate
an hour in a second. The statuses are those of Get-StorageQosFlow: a disk is InsufficientThroughput
when it has a minimum, asks for at least that much, and gets less.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from vhdx.arrays import np
from vhdx.plane import quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WINDOWS", "Alert", "Consumer", "Figures", "History", "Status", "Watch"]

WINDOWS = (1.0, 60.0, 300.0)
"""Seconds over which figures are given."""

_KEPT_SECONDS = 301.0
_ENOUGH = 0.98  # share of the minimum that counts as having reached it
_BUSY = 0.9  # share of checks with enough requests in flight; such a disk wants its minimum
_EDGES = 0.1  # largest tolerance, as a share of the minimum, for requests at the edges of a window
_LATE = 0.5  # seconds; large requests alone can make a deadline late by less than this
_RAISE_AFTER, _CLEAR_AFTER = 0.5, 2.0  # seconds for which the new state must have lasted


class Status(StrEnum):
    """The status of a flow or disk, with the names that Windows uses."""

    OK = "Ok"
    INSUFFICIENT = "InsufficientThroughput"
    UNKNOWN_POLICY = "UnknownPolicyId"


class Sampled(NamedTuple):
    """The counts of a flow or disk at one time."""

    seconds: float
    numbers: np.ndarray[Any, np.dtype[np.uint64]]  # in the order of MeterFacts.numbers


@dataclass(frozen=True)
class Figures:
    """The rates (per second) and latencies (milliseconds) of a flow or disk over a window.

    Attributes:
        seconds: the time that the samples in the window really cover.
        normalized_iops, iops, bandwidth: achieved rates; bandwidth in bytes.
        read_iops, write_iops: achieved normalised IOPS of reads, and of writes, zeros and trims.
        offered_iops: normalised IOPS of requests that arrived, answered or not.
        latency, latency_p50, latency_p99, latency_p999: from arrival to reply.
        queue_time: the mean part of the latency for which limits held a request.
    """

    seconds: float = 0.0
    normalized_iops: float = 0.0
    iops: float = 0.0
    bandwidth: float = 0.0
    read_iops: float = 0.0
    write_iops: float = 0.0
    offered_iops: float = 0.0
    latency: float = 0.0
    latency_p50: float = 0.0
    latency_p99: float = 0.0
    latency_p999: float = 0.0
    queue_time: float = 0.0


def figures_of(first: Sampled, last: Sampled) -> Figures:
    """The figures between two samples."""
    seconds = last.seconds - first.seconds
    if seconds <= 0:
        return Figures()
    did = (last.numbers - first.numbers).tolist()
    requests, units, moved, latency, queued, offered = ((did[i], did[i + 1]) for i in range(0, 12, 2))
    count, bins = max(1, sum(requests)), did[12:]
    return Figures(
        seconds=seconds,
        normalized_iops=sum(units) / seconds,
        iops=sum(requests) / seconds,
        bandwidth=sum(moved) / seconds,
        read_iops=units[0] / seconds,
        write_iops=units[1] / seconds,
        offered_iops=sum(offered) / seconds,
        latency=sum(latency) / count / 1e6,
        latency_p50=quantile(bins, 0.5) / 1e6,
        latency_p99=quantile(bins, 0.99) / 1e6,
        latency_p999=quantile(bins, 0.999) / 1e6,
        queue_time=sum(queued) / count / 1e6,
    )


def together(several: Sequence[Figures]) -> Figures:
    """The sums of several figures of one window, without latencies."""
    names = ("normalized_iops", "iops", "bandwidth", "read_iops", "write_iops", "offered_iops")
    sums = {name: sum(getattr(each, name) for each in several) for name in names}
    return Figures(seconds=max((each.seconds for each in several), default=0.0), **sums)


class History:
    """Samples of one flow or disk, for windows up to five minutes; older samples are dropped."""

    def __init__(self) -> None:
        self._samples: deque[Sampled] = deque()

    def add(self, seconds: float, numbers: Sequence[int]) -> None:
        """Adds a sample in the form of ``MeterFacts.numbers``; calls must be in order of time."""
        self._samples.append(Sampled(seconds, np.array(numbers, np.uint64)))
        while self._samples[0].seconds < seconds - _KEPT_SECONDS:
            self._samples.popleft()

    def figures(self, window: float) -> Figures:
        """The figures of the last ``window`` seconds, or of all samples if they cover less."""
        if len(self._samples) < 2:
            return Figures()
        last = self._samples[-1]
        first = self._samples[0]
        for sample in reversed(self._samples):
            if sample.seconds <= last.seconds - window + 1e-6:
                first = sample
                break
        return figures_of(first, last)

    def thin(self, seconds: float, step: float = 1.0) -> None:
        """Keeps, of the samples older than two seconds, only one in each ``step`` seconds."""
        if len(self._samples) < 3:
            return
        kept: list[Sampled] = []
        for sample in self._samples:
            young = sample.seconds > seconds - 2
            if young or not kept or sample.seconds - kept[-1].seconds >= step - 1e-3:
                kept.append(sample)
        self._samples = deque(kept)


@dataclass(frozen=True)
class Consumer:
    """A disk that took much of the throughput: its name, and its normalised IOPS."""

    disk: str
    iops: float


@dataclass(frozen=True)
class Alert:
    """A disk starts to get less than its minimum, or stops doing so.

    Attributes:
        time: seconds since 1970.
        event: INSUFFICIENT at the start, OK at the end.
        disk: the name of the disk, or the title of an aggregated policy.
        minimum_iops, achieved_iops: normalised.
        top_consumers: the other disks with the most throughput at that time, largest first.
    """

    time: float
    event: Status
    disk: str
    minimum_iops: int
    achieved_iops: float
    top_consumers: tuple[Consumer, ...]

    @classmethod
    def now(
        cls,
        disk: str,
        *,
        begins: bool,
        minimum_iops: int,
        achieved_iops: float,
        top_consumers: tuple[Consumer, ...],
    ) -> Alert:
        """Makes an alert with the current time."""
        event = Status.INSUFFICIENT if begins else Status.OK
        return cls(time.time(), event, disk, minimum_iops, achieved_iops, top_consumers)

    @property
    def begins(self) -> bool:
        """True when the disk starts to miss its minimum, False when it stops missing it."""
        return self.event is Status.INSUFFICIENT

    def __str__(self) -> str:
        if not self.begins and self.minimum_iops == 0:
            return f"{self.disk} does not miss a minimum any more: it has none"
        if not self.begins and self.achieved_iops < _ENOUGH * self.minimum_iops:
            return (
                f"{self.disk} does not miss its minimum of {self.minimum_iops} normalised IOPS any "
                f"more: it asks for less ({self.achieved_iops:.0f} now)"
            )
        if not self.begins:
            return (
                f"{self.disk} gets its minimum of {self.minimum_iops} normalised IOPS again "
                f"({self.achieved_iops:.0f})"
            )
        who = ", ".join(f"{each.disk} {each.iops:.0f}" for each in self.top_consumers)
        return (
            f"{self.disk} gets {self.achieved_iops:.0f} of its minimum of {self.minimum_iops} "
            f"normalised IOPS; " + (f"most of the rest: {who}" if who else "no other disk takes any")
        )


@dataclass
class Watch:
    """Tracks, sample by sample, whether one disk or aggregated policy gets its minimum."""

    title: str = ""
    insufficient: bool = False
    _since: float | None = field(default=None, repr=False)  # when samples began to disagree with it

    def evaluate(
        self,
        seconds: float,
        minimum: int | None,
        figures: Figures,
        busy: float,
        late: float = float("inf"),
    ) -> bool | None:
        """Returns True when an alert begins now, False when it ends, else None.

        Args:
            seconds: the current time.
            minimum: the minimum of the disk or policy; None for none.
            figures: the figures of the last second.
            busy: share of that second in which enough requests were in flight.
            late: seconds by which its deadline is missed; infinite without a scheduler.
        """
        wants = minimum is not None and (figures.offered_iops >= minimum or busy >= _BUSY)
        short = wants and figures.normalized_iops < _enough(minimum or 0, figures)
        short = short and (late > _LATE or self.insufficient)
        if short == self.insufficient:
            self._since = None
            return None
        if self._since is None:
            self._since = seconds
        if seconds - self._since < (_CLEAR_AFTER if self.insufficient else _RAISE_AFTER) - 1e-6:
            return None
        self.insufficient, self._since = short, None
        return short


def _enough(minimum: int, figures: Figures) -> float:
    """The least IOPS that raise no alert; one request at either edge may count elsewhere."""
    units = figures.normalized_iops / figures.iops if figures.iops else 0.0
    edges = 2 * units / figures.seconds if figures.seconds else 0.0
    return _ENOUGH * minimum - min(edges, _EDGES * minimum)
