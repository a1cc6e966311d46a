# SPDX-License-Identifier: MIT
"""Samples the counters of flows and disks, and raises alerts when a minimum is missed.

Sampling runs while there is a subscription (:meth:`Sampler.subscribe`), while a disk or policy has
a minimum, and until the last alert has ended. Otherwise nothing is measured.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from vhdx.errors import InvalidArgumentError
from vhdx.qos.flows import TICK_SECONDS
from vhdx.qos.monitor import Alert, Consumer, History, together

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vhdx import plane
    from vhdx.qos.alerts import Alerts
    from vhdx.qos.flows import Flow
    from vhdx.qos.registry import Registry, Watched
    from vhdx.qos.shared_device import SharedDevice

__all__ = ["Sampler"]

_log = logging.getLogger(__name__)
_TICKS_A_SAMPLE = 5
_SAMPLES_A_THINNING = 8
_MOST_CONSUMERS = 3


class Sampler:
    """Takes samples of the flows and disks of a registry.

    The lock of the registry guards every field, and is held while a sample is taken. Alerts are
    delivered without the lock.

    Args:
        registry: has the flows and disks.
        device: the device that the disks share.
        alerts: receives the alerts.
        clock: a virtual clock for experiments; then only :meth:`advance` takes samples.
    """

    def __init__(
        self,
        registry: Registry,
        device: SharedDevice,
        alerts: Alerts,
        clock: plane.Clock | None,
    ) -> None:
        self._registry, self._device, self._alerts = registry, device, alerts
        self._clock = clock
        self._subscribed_until = float("-inf")
        self._thread: threading.Thread | None = None
        self._since: float | None = None  # when sampling began; None: it does not run
        self._ticks = 0  # only with a virtual clock
        self._closing = threading.Event()

    def _now(self) -> float:
        """Seconds of the virtual clock, or of the monotonic clock without one."""
        return time.monotonic() if self._clock is None else self._clock.now / 1e9

    def subscribe(self, seconds: float) -> None:
        """Keeps sampling on for at least ``seconds`` from now."""
        with self._registry.lock:
            self._subscribed_until = max(self._subscribed_until, self._now() + seconds)
            self.begin()

    def sampled_seconds(self) -> float:
        """How long sampling has gone on without a break; 0 where it does not run."""
        with self._registry.lock:
            return 0.0 if self._since is None else self._now() - self._since

    def add(self, flow: Flow) -> None:
        """Starts sampling for a new flow if sampling is wanted."""
        with self._registry.lock:
            flow.meter.switch(on=self._is_wanted())
            self.begin()

    def _is_wanted(self) -> bool:
        if self._now() < self._subscribed_until:
            return True
        return any(
            each.minimum is not None or each.watch.insufficient for each in self._registry.watched()
        )

    def begin(self) -> None:
        """Starts sampling if it is wanted and does not run yet."""
        with self._registry.lock:
            if self._since is not None or self._closing.is_set() or not self._is_wanted():
                return
            if self._clock is None:
                thread = threading.Thread(target=self._run, name="vhdx-qos", daemon=True)
                try:
                    thread.start()  # it waits for the lock, which is held here
                except RuntimeError as error:  # the next subscription or change tries again
                    _log.warning("QoS: nothing is measured: %s", error)
                    return
                self._thread = thread
            self._since = self._now()
            for disk in self._registry.disks.values():
                disk.history = History()  # there are no samples since sampling stopped
            for flow in self._registry.flows:
                flow.history = History()
                flow.meter.switch(on=True)

    def _run(self) -> None:
        try:
            self._take_samples()
        finally:
            with self._registry.lock:
                if self._thread is threading.current_thread():
                    self._thread, self._since = None, None

    def _take_samples(self) -> None:
        tick = 0
        due = time.monotonic()
        while not self._closing.wait(max(0.0, due - time.monotonic())):
            tick += 1
            due += TICK_SECONDS
            now = time.monotonic()
            if now > due:  # the thread was delayed: skip the missed samples
                due = now + TICK_SECONDS
            if not self._tick(now, tick):
                return

    def _tick(self, now: float, tick: int) -> bool:
        """Notes which disks are busy, and takes a sample on every fifth call.

        Returns:
            Whether sampling continues.
        """
        with self._registry.lock:
            self._note_busy()
            if tick % _TICKS_A_SAMPLE:
                return True
            self._device.sample()
            self._note(now, thin=tick % (_TICKS_A_SAMPLE * _SAMPLES_A_THINNING) == 0)
            alerts = self._evaluate(now)
            goes_on = self._is_wanted()
            if not goes_on:  # the next :meth:`begin` starts a new thread
                self._thread, self._since = None, None
                for flow in self._registry.flows:
                    flow.meter.switch(on=False)
        for alert in alerts:
            self._alerts.tell(alert)
        return goes_on

    def advance(self, seconds: float) -> None:
        """Advances the virtual clock; see :meth:`Domain.advance`."""
        if self._clock is None:
            raise InvalidArgumentError("only a virtual clock can be advanced")
        end = self._clock.now + round(seconds * 1e9)
        while self._clock.now < end:
            self._ticks += 1
            self._clock.advance(min(end, self._clock.now + round(TICK_SECONDS * 1e9)))
            self._tick(self._now(), self._ticks)

    def _note_busy(self) -> None:
        """Notes for each disk whether its requests in flight reach the depth of its minimum."""
        for name, disk in self._registry.disks.items():
            enough = self._registry.effective(disk).minimum_depth or 1
            mine = (flow for flow in self._registry.flows if flow.disk == name)
            disk.busy.append(sum(flow.under_way() for flow in mine) >= enough)

    def _note(self, now: float, *, thin: bool) -> None:
        """Adds a sample to each flow and disk; ``thin`` also drops most of the older samples."""
        disks, flows = self._registry.disks, self._registry.flows
        totals = {name: list(disk.departed) for name, disk in disks.items()}
        for flow in flows:
            numbers = flow.meter.read().numbers()
            flow.history.add(now, numbers)
            totals[flow.disk] = [a + b for a, b in zip(totals[flow.disk], numbers, strict=True)]
        for name, disk in disks.items():
            disk.history.add(now, totals[name])
        if thin:
            for history in [each.history for each in flows] + [d.history for d in disks.values()]:
                history.thin(now)

    def _evaluate(self, now: float) -> list[Alert]:
        """The alerts that begin or end with this sample."""
        disks = self._registry.disks
        last = {name: disk.history.figures(1.0) for name, disk in disks.items()}
        found = []
        for each in self._registry.watched():
            achieved = together([last[name] for name in each.names])
            busy = max((_share_of_true(disks[name].busy) for name in each.names), default=0.0)
            late = self._device.lateness(each.share)
            begins = each.watch.evaluate(now, each.minimum, achieved, busy, late)
            if begins is None:
                continue
            others = {n: f.normalized_iops for n, f in last.items() if n not in each.names}
            found.append(_alert(each, achieved.normalized_iops, others, begins=begins))
        return found

    def close(self) -> None:
        """Ends sampling, and waits for its thread."""
        with self._registry.lock:
            self._closing.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()


def _share_of_true(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / max(1, len(values))


def _alert(each: Watched, achieved: float, others: dict[str, float], *, begins: bool) -> Alert:
    consumers = sorted(
        (Consumer(name, iops) for name, iops in others.items() if iops > 0),
        key=lambda consumer: -consumer.iops,
    )
    return Alert.now(
        each.title,
        begins=begins,
        minimum_iops=each.minimum or 0,
        achieved_iops=achieved,
        top_consumers=tuple(consumers[:_MOST_CONSUMERS]),
    )
