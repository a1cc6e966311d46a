# SPDX-License-Identifier: MIT
"""Applies limits and policies to the disks of a server, and watches what they get.

Threads: changes may come from any thread. ``_change_lock`` makes them one at a time and is held while
the file is written; ``_lock``, taken inside it, guards what is wanted and what is known, and is held
for moments only. A change is in the file before it counts, so a failure leaves everything as it was.
A thread takes samples while somebody looks, or a disk has a minimum; otherwise nothing is measured.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import UUID

from vhdx import plane
from vhdx.errors import ClosedError, ExistsError, InvalidArgumentError, NotFoundError
from vhdx.qos.alerts import Alerts
from vhdx.qos.flows import TICK_SECONDS, DiskState, Flow
from vhdx.qos.monitor import WINDOWS, Alert, History, Status, Watch, together
from vhdx.qos.policy import NORMALISED_UNIT, Policy, PolicyKind, Settings
from vhdx.qos.reservations import (
    Reservation,
    Wish,
    contradictions,
    group_of,
    reservations,
    together_with_policy,
)
from vhdx.qos.scheduling import Scheduling, Turns, set_share

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from vhdx.qos.store import Store

__all__ = ["Domain"]

_log = logging.getLogger(__name__)
_TICKS_A_SAMPLE = 5
_LOOKED_SECONDS = 310.0  # longer than the longest window, and than Prometheus waits
_MOST_TAKERS = 3
_NO_CHANGE: Mapping[str, Wish] = {}
_NOTHING_WANTED = {"settings": Settings().as_dict(), "policy": None}


class Domain:
    """The QoS of one server.

    Args:
        pool: the server's.
        unit: bytes of a normalised I/O, 512 to 1 MiB.
        store: where settings are kept, and where they are taken from.
        hook: a command that is run for each alert, with what it is about in the environment.
        scheduling: whether minimums are kept, and how; watched only when None.
        sizes: of the disks that will be added, bytes; for a model.
        clock: a virtual one, for experiments: nothing is sampled but by :meth:`advance`.
    """

    def __init__(
        self,
        pool: plane.Pool,
        *,
        unit: int = NORMALISED_UNIT,
        store: Store | None = None,
        hook: str | None = None,
        scheduling: Scheduling | None = None,
        sizes: Iterable[int] = (),
        clock: plane.Clock | None = None,
    ) -> None:
        if not 512 <= unit <= 1 << 20:
            raise InvalidArgumentError(
                f"a normalised I/O of {unit} bytes", hint="choose 512 bytes to 1 MiB"
            )
        self.unit, self._store = unit, store
        self._clock = clock
        self._pacing = plane.Pacing(pool, clock)
        self._turns = Turns(scheduling or Scheduling(), pool, unit, sizes, clock)
        self._lock = threading.RLock()
        self._change_lock = threading.Lock()
        self._disks: dict[str, DiskState] = {}
        self._policies: dict[UUID, Policy] = {}
        self._groups: dict[UUID, plane.Limits] = {}
        self._flows: list[Flow] = []
        self._group_watches: dict[UUID, Watch] = {}
        self._alerts = Alerts(hook)
        self._looked = float("-inf")
        self._sampler: threading.Thread | None = None
        self._sampling = False
        self._ticks = 0  # of a virtual clock
        self._closing = threading.Event()
        if store is not None:
            with store.believed():
                for each in store.content["policies"]:
                    policy = Policy.of(each)
                    self._check_name(policy)
                    if policy.policy_id in self._policies:
                        raise InvalidArgumentError(f"two policies are {policy.policy_id}")
                    self._keep(policy)

    def _now(self) -> float:
        """Seconds, of whatever clock counts."""
        return time.monotonic() if self._clock is None else self._clock.now / 1e9

    # ---- disks ----

    def add_disk(
        self,
        name: str,
        path: str,
        device: plane.Device,
        changes: Settings | Mapping[str, Any] | None = None,
    ) -> None:
        """A disk that is served from now on; ``changes`` are made to what the file says.

        Settings change what they do not leave at its default.
        """
        with self._lock:
            path = os.path.realpath(path)
            twin = next(iter(self._of_path(path)), None)
            limits = plane.Limits(self._pacing, self.unit) if twin is None else twin.limits
            disk = DiskState(path, device, self._turns, limits, twin)
            if self._store is not None and twin is None:
                with self._store.believed():
                    kept = self._store.content["disks"].get(disk.path, {})
                    disk.settings = Settings().changed(kept.get("settings", {}))
                    if kept.get("policy"):
                        disk.policy_id = UUID(kept["policy"])
            if isinstance(changes, Settings):
                changes = {k: v for k, v in changes.as_dict().items() if v}
            disk.settings = disk.settings.changed(changes or {})
            self._disks[name] = disk
            for each in self._of_path(path):
                each.settings = disk.settings
                self._apply(each, fresh=twin is None)

    def begin(self) -> None:
        """All disks were added: what was given for them goes to the file, with warnings.

        Raises:
            HostIOError, NoSpaceError: the file cannot be written.
        """
        with self._change_lock:
            self._save({}, self._policies)
        for name, disk in self._disks.items():
            if disk.policy_id is not None and disk.policy_id not in self._policies:
                _log.warning("QoS: %s has a policy that is not known: %s", name, disk.policy_id)
        said = self._turns.warning(self._reserved())
        if said is not None:
            _log.warning("QoS: %s", said)
        for _, error in contradictions(self._as_wanted(), self._policies).values():
            _log.warning("QoS: %s", error)

    def set_disk(
        self, name: str, changes: Mapping[str, Any], policy: str | None = None
    ) -> str | None:
        """Changes what is wanted of a disk, live.

        Args:
            name: of the disk.
            changes: settings by name; None takes one away.
            policy: name or id of its policy; "" for none, None leaves it.

        Returns:
            What to say where the minimums cannot all be kept, by the capacity that was seen.

        Raises:
            NotFoundError: no such disk or policy.
            InvalidArgumentError: settings that cannot be.
            HostIOError, NoSpaceError: the file cannot be written. Nothing is changed then.
        """
        with self._change_lock:
            disk = self._disk(name)
            settings = disk.settings.changed(changes)
            policy_id = disk.policy_id
            if policy is not None:
                policy_id = self.policy(policy).policy_id if policy else None
            said = self._admit({disk.path: Wish(settings, policy_id)}, self._policies)
            self._save({disk.path: Wish(settings, policy_id)}, self._policies)
            with self._lock:
                for each in self._of_path(disk.path):
                    each.settings, each.policy_id = settings, policy_id
                    self._apply(each)
            return said

    def _of_path(self, path: str) -> list[DiskState]:
        return [disk for disk in self._disks.values() if disk.path == path]

    def _disk(self, name: str) -> DiskState:
        disk = self._disks.get(name)
        if disk is None:
            raise NotFoundError(f"there is no disk {name!r}")
        return disk

    def _wanted(self, disk: DiskState) -> Settings:
        """What counts for a disk: its own settings and its policy's, the tighter of each."""
        return together_with_policy(disk.settings, disk.policy_id, self._policies)

    def _as_wanted(self, changed: Mapping[str, Wish] = _NO_CHANGE) -> list[Wish]:
        """Of each disk, as it would be with these, by path."""
        disks = {each.path: each for each in self._disks.values()}.values()
        return [changed.get(disk.path, Wish(disk.settings, disk.policy_id)) for disk in disks]

    def _reserved(self) -> list[Reservation]:
        return reservations(self._as_wanted(), self._policies)

    def _admit(
        self,
        changed: Mapping[str, Wish],
        policies: Mapping[UUID, Policy],
    ) -> str | None:
        wanted = self._as_wanted(changed)
        there = contradictions(self._as_wanted(), self._policies)
        for policy_id, (excess, error) in contradictions(wanted, policies).items():
            if policy_id not in there or excess > there[policy_id][0]:
                raise error
        said = self._turns.admit(self._reserved(), reservations(wanted, policies))
        if said is not None:
            _log.warning("QoS: %s", said)
        return said

    def _apply_share(self, disk: DiskState, wanted: Settings) -> None:
        """A disk waits in its policy's share where that is aggregated, and it has no own minimum."""
        if disk.share is None:
            return
        set_share(disk.share, wanted)
        share = disk.share
        policy = group_of(wanted, disk.policy_id, self._policies)
        if policy is not None:
            share = self._turns.share_of(policy.policy_id, policy.settings) or share
        assert isinstance(disk.device, plane.Scheduled)
        disk.device.set_share(share)

    def _apply(self, disk: DiskState, *, fresh: bool = False) -> None:
        wanted = self._wanted(disk)
        disk.limits.set(wanted.limits(), fresh=fresh)
        self._apply_share(disk, wanted)
        group = None if disk.policy_id is None else self._groups.get(disk.policy_id)
        for flow in self._flows:
            if self._disks.get(flow.disk) is disk:
                flow.throttle.set_group(group)
        self._turns.adapt(self._reserved())
        self._begin_sampling()

    # ---- policies ----

    def policy(self, name: str) -> Policy:
        """By its name or id.

        Raises:
            NotFoundError: there is none.
        """
        with self._lock:
            for policy in self._policies.values():
                if name in {policy.name, str(policy.policy_id)}:
                    return policy
        raise NotFoundError(f"there is no policy {name!r}", hint="see vhdx qos policy list")

    def set_policy(self, policy: Policy) -> str | None:
        """Makes a policy, or changes one with the same id; disks that name it follow at once.

        Returns:
            As :meth:`set_disk`.

        Raises:
            ExistsError: another policy has this name.
            InvalidArgumentError: its kind cannot change.
            HostIOError, NoSpaceError: the file cannot be written. Nothing is changed then.
        """
        return self.change_policy(policy.name, lambda _: policy)[1]

    def change_policy(
        self, name: str, change: Callable[[Policy | None], Policy]
    ) -> tuple[Policy, str | None]:
        """Like :meth:`set_policy`, with what ``change`` makes of what there is.

        Nothing else changes meanwhile. It gets the policy of this name or id, or None.
        """
        with self._change_lock:
            try:
                found = self.policy(name)
            except NotFoundError:
                found = None
            policy = change(found)
            old = self._policies.get(policy.policy_id)
            if old is not None and old.kind is not policy.kind:
                raise InvalidArgumentError(
                    f"policy {old.name!r} is {old.kind}, and that cannot change",
                    hint="make another policy",
                )
            self._check_name(policy)
            policies = self._policies | {policy.policy_id: policy}
            said = self._admit({}, policies)
            self._save({}, policies)
            with self._lock:
                self._keep(policy)
                self._follow(policy.policy_id)
            return policy, said

    def remove_policy(self, name: str) -> list[str]:
        """Takes a policy away; its disks have their own limits only, until it comes back.

        Returns:
            The names of those disks.
        """
        with self._change_lock:
            policy = self.policy(name)
            left = {key: each for key, each in self._policies.items() if each is not policy}
            said = self._turns.warning(reservations(self._as_wanted(), left))
            if said is not None:  # it held minimums down, and is taken away nevertheless
                _log.warning("QoS: %s", said)
            self._save({}, left)
            with self._lock:
                del self._policies[policy.policy_id]
                group = self._groups.get(policy.policy_id)
                if group is not None:
                    group.set({})
                self._follow(policy.policy_id)
                names = [n for n, d in self._disks.items() if d.policy_id == policy.policy_id]
            for name in names:
                _log.warning("QoS: %s runs on without policy %r", name, policy.name)
            return names

    def _check_name(self, policy: Policy) -> None:
        for other in self._policies.values():
            if other.name == policy.name and other.policy_id != policy.policy_id:
                raise ExistsError(f"there is a policy {policy.name!r} already")

    def _keep(self, policy: Policy) -> None:
        self._policies[policy.policy_id] = policy
        if policy.kind is PolicyKind.AGGREGATED:
            group = self._groups.get(policy.policy_id)
            if group is None:  # kept for good: flows may be looking at it
                group = self._groups[policy.policy_id] = plane.Limits(self._pacing, self.unit)
            self._group_watches.setdefault(policy.policy_id, Watch()).title = f"policy {policy.name}"
            group.set(policy.settings.limits())

    def _follow(self, policy_id: UUID) -> None:
        for disk in self._disks.values():
            if disk.policy_id == policy_id:
                self._apply(disk)

    def _save(
        self,
        changed: Mapping[str, Wish],
        policies: Mapping[UUID, Policy],
    ) -> None:
        """Writes the file as it is to be: with these disks, by path, and these policies."""
        if self._closing.is_set():
            raise ClosedError("the server is closing")
        if self._store is None:
            return
        wanted = {d.path: Wish(d.settings, d.policy_id) for d in self._disks.values()}
        disks = dict(self._store.content["disks"])
        for path, (settings, policy_id) in (wanted | dict(changed)).items():
            policy = None if policy_id is None else str(policy_id)
            entry = {"settings": settings.as_dict(), "policy": policy}
            if path in disks or entry != _NOTHING_WANTED:
                disks[path] = entry
        content = {"disks": disks, "policies": [policy.as_dict() for policy in policies.values()]}
        if content != self._store.content:
            self._store.save(content)

    # ---- flows ----

    def connect(self, name: str, initiator: str) -> Flow:
        """A flow of an initiator to a disk, until :meth:`disconnect`."""
        with self._lock:
            disk = self._disk(name)
            group = None if disk.policy_id is None else self._groups.get(disk.policy_id)
            throttle = plane.Throttle(disk.device, self._pacing, disk.limits, group)
            flow = Flow(name, initiator, throttle, plane.Meter(self.unit))
            flow.meter.switch(on=self._measures())
            self._begin_sampling()
            self._flows.append(flow)
            return flow

    def disconnect(self, flow: Flow) -> None:
        """The initiator has left; what it did still counts for its disk."""
        with self._lock:
            self._flows.remove(flow)
            disk = self._disks[flow.disk]
            did = flow.meter.read().numbers()
            disk.departed = [a + b for a, b in zip(disk.departed, did, strict=True)]

    # ---- what they get ----

    def describe(self) -> dict[str, Any]:
        """Policies, disks and flows with their figures over each window; for JSON."""
        with self._lock:
            if self._closing.is_set():
                raise ClosedError("the server is closing")
            self._looked = self._now()
            self._begin_sampling()
            return {
                "unit": self.unit,
                "scheduling": self._turns.describe(self._reserved()),
                "policies": [policy.as_dict() for policy in self._policies.values()],
                "disks": [self._describe_disk(name) for name in self._disks],
                "flows": [self._describe_flow(flow) for flow in self._flows],
            }

    def _status(self, disk: DiskState) -> Status:
        if disk.policy_id is not None and disk.policy_id not in self._policies:
            return Status.UNKNOWN_POLICY
        policy = group_of(disk.settings, disk.policy_id, self._policies)
        group = None if policy is None else self._group_watches.get(policy.policy_id)
        short = disk.watch.insufficient or (group is not None and group.insufficient)
        return Status.INSUFFICIENT if short else Status.OK

    def _describe_disk(self, name: str) -> dict[str, Any]:
        disk = self._disks[name]
        wanted = self._wanted(disk)
        levels = disk.limits.levels()
        return {
            "disk": name,
            "path": disk.path,
            "policy_id": None if disk.policy_id is None else str(disk.policy_id),
            "status": self._status(disk).value,
            "settings": disk.settings.as_dict(),
            "effective": wanted.as_dict(),
            "waiting": sum(flow.throttle.waiting()[0] for flow in self._flows if flow.disk == name)
            + (disk.device.waiting() if isinstance(disk.device, plane.Scheduled) else 0),
            "credits": {kind.name.lower(): levels[kind] for kind in wanted.limits()},
            "windows": {f"{window:g}": asdict(disk.history.figures(window)) for window in WINDOWS},
        }

    def _describe_flow(self, flow: Flow) -> dict[str, Any]:
        waiting, units = flow.throttle.waiting()
        return {
            "disk": flow.disk,
            "initiator": flow.initiator,
            "status": self._status(self._disks[flow.disk]).value,
            "waiting": waiting,
            "waiting_units": units,
            "windows": {f"{w:g}": asdict(flow.history.figures(w)) for w in WINDOWS},
        }

    def listening(
        self, listener: Callable[[Alert], None]
    ) -> contextlib.AbstractContextManager[list[Alert]]:
        """See :meth:`Alerts.listening`."""
        return self._alerts.listening(listener)

    def _measures(self) -> bool:
        if self._now() - self._looked < _LOOKED_SECONDS:
            return True
        return any(minimum is not None or w.insufficient for _, _, minimum, w, _ in self._watched())

    def _begin_sampling(self) -> None:
        if not self._sampling and self._measures() and not self._closing.is_set():
            if self._clock is None:
                sampler = threading.Thread(target=self._sample, name="vhdx-qos", daemon=True)
                try:
                    sampler.start()  # it waits for the lock
                except RuntimeError as error:  # the next look or change tries again
                    _log.warning("QoS: nothing is measured: %s", error)
                    return
                self._sampler = sampler
            self._sampling = True
            for disk in self._disks.values():
                disk.history = History()  # nothing is known of the time in between
            for flow in self._flows:
                flow.history = History()
                flow.meter.switch(on=True)

    def _sample(self) -> None:
        try:
            self._sample_on()
        finally:
            with self._lock:
                if self._sampler is threading.current_thread():
                    self._sampler, self._sampling = None, False

    def _sample_on(self) -> None:
        tick = 0
        due = time.monotonic()
        while not self._closing.wait(max(0.0, due - time.monotonic())):
            tick += 1
            due += TICK_SECONDS
            now = time.monotonic()
            if now > due:  # the process was stopped: what was missed is not made up for
                due = now + TICK_SECONDS
            if not self._tick(now, tick):
                return

    def _tick(self, now: float, tick: int) -> bool:
        """Looks who is busy, and now and then what all got; False: nobody wants to know any more."""
        with self._lock:
            for name, disk in self._disks.items():
                wanted = self._wanted(disk).minimum_depth or 1
                disk.busy.append(sum(f.under_way() for f in self._flows if f.disk == name) >= wanted)
            if tick % _TICKS_A_SAMPLE:
                return True
            self._turns.sample()
            self._note(now, thin=tick % (_TICKS_A_SAMPLE * 8) == 0)
            found = self._judge(now)
            goes_on = self._measures()
            if not goes_on:  # from here on a look begins anew
                self._sampler, self._sampling = None, False
                for flow in self._flows:
                    flow.meter.switch(on=False)
        for alert in found:
            self._alerts.tell(alert)
        return goes_on

    def advance(self, seconds: float) -> None:
        """Lets virtual time pass, with the samples and alerts that come in it.

        Raises:
            InvalidArgumentError: time is real.
        """
        if self._clock is None:
            raise InvalidArgumentError("real time passes by itself")
        end = self._clock.now + round(seconds * 1e9)
        while self._clock.now < end:
            self._ticks += 1
            self._clock.advance(min(end, self._clock.now + round(TICK_SECONDS * 1e9)))
            self._tick(self._now(), self._ticks)

    def _note(self, now: float, *, thin: bool) -> None:
        """A sample of each flow and disk."""
        totals = {name: list(disk.departed) for name, disk in self._disks.items()}
        for flow in self._flows:
            numbers = flow.meter.read().numbers()
            flow.history.add(now, numbers)
            total = totals[flow.disk]
            for i, number in enumerate(numbers):
                total[i] += number
            if thin:
                flow.history.thin(now)
        for name, disk in self._disks.items():
            disk.history.add(now, totals[name])
            if thin:
                disk.history.thin(now)

    def _judge(self, now: float) -> list[Alert]:
        found = []
        last = {name: disk.history.figures(1.0) for name, disk in self._disks.items()}
        for what, names, minimum, watch, share in self._watched():
            got = together([last[name] for name in names])
            busy = max(
                (sum(d.busy) / max(1, len(d.busy)) for d in map(self._disks.get, names) if d),
                default=0.0,
            )
            begins = watch.judge(now, minimum, got, busy, self._turns.late(share))
            if begins is None:
                continue
            others = [(other, f.normalized_iops) for other, f in last.items() if other not in names]
            takers = sorted((each for each in others if each[1] > 0), key=lambda each: -each[1])
            top = tuple(takers[:_MOST_TAKERS])
            found.append(Alert(time.time(), what, begins, minimum or 0, got.normalized_iops, top))
        return found

    def _watched(self) -> Iterator[tuple[str, list[str], int | None, Watch, plane.Share | None]]:
        """Each disk and aggregated policy: title, names, minimum, and who watches it.

        One that has no minimum or disks any more is watched on, so that its alert ends.
        """
        paths: dict[str, list[str]] = {}
        for name, disk in self._disks.items():
            paths.setdefault(disk.path, []).append(name)
        for names in paths.values():
            disk = self._disks[names[0]]
            yield names[0], names, self._wanted(disk).minimum_iops, disk.watch, disk.share
        for policy_id, watch in self._group_watches.items():
            policy = self._policies.get(policy_id)
            minimum = None if policy is None else policy.settings.minimum_iops
            mine = [
                name
                for name, disk in self._disks.items()
                if disk.policy_id == policy_id
                and group_of(disk.settings, policy_id, self._policies) is not None
            ]
            yield watch.title, mine, minimum if mine else None, watch, self._turns.group(policy_id)

    def pace(self, size: int) -> None:
        """Work in the background waits here until it may do so many bytes of I/O."""
        self._turns.pace(size)

    def close(self) -> None:
        """Nothing is sampled, changed or told any more, and the file may be another server's."""
        with self._lock:
            self._closing.set()
            sampler = self._sampler
        self._turns.close()
        if sampler is not None and sampler is not threading.current_thread():
            sampler.join()
        self._alerts.close()
        with self._change_lock:
            if self._store is not None:
                self._store.close()
