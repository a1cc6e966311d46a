# SPDX-License-Identifier: MIT
"""The disks, policies and flows of a server, and their QoS settings.

Locks. ``_change_lock`` serializes changes and is held while the QoS file is written. ``lock`` is
taken inside it and guards every public attribute here and all :class:`DiskState` and :class:`Flow`
objects; no file is read or written under it. A change is saved before it takes effect, so a change
that fails has no effect.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from vhdx import plane
from vhdx.errors import ClosedError, ExistsError, InvalidArgumentError, NotFoundError
from vhdx.qos.flows import DiskState, Flow
from vhdx.qos.monitor import Status, Watch
from vhdx.qos.policy import Policy, PolicyKind, Settings
from vhdx.qos.reservations import (
    DesiredQos,
    Reservation,
    contradictions,
    effective_settings,
    reservations,
    shared_policy,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vhdx.qos.shared_device import SharedDevice
    from vhdx.qos.store import Store

__all__ = ["Registry", "Watched"]

_log = logging.getLogger(__name__)
_NO_CHANGE: Mapping[str, DesiredQos] = {}


class Watched(NamedTuple):
    """A disk or an aggregated policy whose minimum is watched.

    Attributes:
        title: its name in alerts.
        names: the names of its disks.
        minimum: its minimum; None if it has none, or no longer has one.
        watch: the state of the check.
        share: its share of the shared device; None without a scheduler.
    """

    title: str
    names: list[str]
    minimum: int | None
    watch: Watch
    share: plane.Share | None


class Registry:
    """The disks, policies and flows of one server.

    Args:
        pacing: the limits are created in it.
        unit: bytes of a normalised I/O.
        store: the QoS file that settings are read from and saved to.
        device: the device that the disks share.

    Attributes:
        disks: by name. Guarded by ``lock``.
        policies: by id. Guarded by ``lock``.
        flows: of all disks. Guarded by ``lock``.
    """

    def __init__(
        self, pacing: plane.Pacing, unit: int, store: Store | None, device: SharedDevice
    ) -> None:
        self._pacing, self._unit, self._store, self._device = pacing, unit, store, device
        self.lock = threading.RLock()
        self.disks: dict[str, DiskState] = {}
        self.policies: dict[UUID, Policy] = {}
        self.flows: list[Flow] = []
        self._change_lock = threading.Lock()
        self._closed = False  # under _change_lock
        # Entries are never removed, because flows may still use them; guarded by lock.
        self._group_limits: dict[UUID, plane.Limits] = {}
        self._group_watches: dict[UUID, Watch] = {}
        if store is not None:
            with store.content_errors():
                for each in store.content["policies"]:
                    policy = Policy.of(each)
                    self._check_name(policy)
                    if policy.policy_id in self.policies:
                        raise InvalidArgumentError(f"two policies have the id {policy.policy_id}")
                    self._keep(policy)

    # ---- disks ----

    def add_disk(
        self,
        name: str,
        path: str,
        device: plane.Device,
        changes: Settings | Mapping[str, Any] | None,
    ) -> None:
        """Adds a disk; see :meth:`Domain.add_disk`."""
        with self.lock:
            path = os.path.realpath(path)
            alias = next(iter(self._aliases(path)), None)
            limits = plane.Limits(self._pacing, self._unit) if alias is None else alias.limits
            attachment = self._device.attach(device, None if alias is None else alias.attachment)
            disk = DiskState(path, attachment, limits, alias)
            if self._store is not None and alias is None:
                with self._store.content_errors():
                    kept = self._store.content["disks"].get(disk.path, {})
                    disk.settings = Settings().changed(kept.get("settings", {}))
                    if kept.get("policy"):
                        disk.policy_id = UUID(kept["policy"])
            if isinstance(changes, Settings):
                changes = {k: v for k, v in changes.as_dict().items() if v}
            disk.settings = disk.settings.changed(changes or {})
            self.disks[name] = disk
            for each in self._aliases(path):
                each.settings = disk.settings
                self._apply(each, fresh=alias is None)
            self._device.adapt(self.reservations())

    def begin(self) -> None:
        """Saves the settings of all disks, and logs unknown policies and minimums that conflict."""
        with self._change_lock:
            self._save({}, self.policies)
        with self.lock:
            for name, disk in self.disks.items():
                if disk.policy_id is not None and disk.policy_id not in self.policies:
                    _log.warning("QoS: %s has an unknown policy: %s", name, disk.policy_id)
            warning = self._device.warning(self.reservations())
            _warn(warning)
            for _, error in contradictions(self._desired(), self.policies).values():
                _log.warning("QoS: %s", error)

    def set_disk(self, name: str, changes: Mapping[str, Any], policy: str | None) -> str | None:
        """Changes the settings of a disk; see :meth:`Domain.set_disk`."""
        with self._change_lock:
            disk = self.disk(name)
            settings = disk.settings.changed(changes)
            policy_id = disk.policy_id
            if policy is not None:
                policy_id = self.policy(policy).policy_id if policy else None
            changed = {disk.path: DesiredQos(settings, policy_id)}
            warning = self._admit(changed, self.policies)
            self._save(changed, self.policies)
            with self.lock:
                for each in self._aliases(disk.path):
                    each.settings, each.policy_id = settings, policy_id
                    self._apply(each)
                self._device.adapt(self.reservations())
            return warning

    def disk(self, name: str) -> DiskState:
        """The disk of that name.

        Raises:
            NotFoundError: there is none.
        """
        with self.lock:
            disk = self.disks.get(name)
        if disk is None:
            raise NotFoundError(f"there is no disk {name!r}")
        return disk

    def effective(self, disk: DiskState) -> Settings:
        """The effective settings of a disk: its own, combined with those of a dedicated policy."""
        return effective_settings(DesiredQos(disk.settings, disk.policy_id), self.policies)

    def status(self, disk: DiskState) -> Status:
        """Whether a disk, or the aggregated policy that it shares, gets its minimum."""
        if disk.policy_id is not None and disk.policy_id not in self.policies:
            return Status.UNKNOWN_POLICY
        policy = shared_policy(disk.settings, disk.policy_id, self.policies)
        group = None if policy is None else self._group_watches.get(policy.policy_id)
        short = disk.watch.insufficient or (group is not None and group.insufficient)
        return Status.INSUFFICIENT if short else Status.OK

    def _aliases(self, path: str) -> list[DiskState]:
        return [disk for disk in self.disks.values() if disk.path == path]

    def _desired(self, changed: Mapping[str, DesiredQos] = _NO_CHANGE) -> list[DesiredQos]:
        """The settings and policy of each image, with ``changed`` (by path) in place of its own."""
        with self.lock:
            disks = {each.path: each for each in self.disks.values()}.values()
            return [changed.get(d.path, DesiredQos(d.settings, d.policy_id)) for d in disks]

    def reservations(self) -> list[Reservation]:
        """The minimums of all disks and aggregated policies."""
        return reservations(self._desired(), self.policies)

    def _admit(
        self, changed: Mapping[str, DesiredQos], policies: Mapping[UUID, Policy]
    ) -> str | None:
        desired = self._desired(changed)
        before = contradictions(self._desired(), self.policies)
        for policy_id, (excess, error) in contradictions(desired, policies).items():
            if policy_id not in before or excess > before[policy_id][0]:
                raise error
        warning = self._device.admit(self.reservations(), reservations(desired, policies))
        _warn(warning)
        return warning

    def _apply(self, disk: DiskState, *, fresh: bool = False) -> None:
        """Applies effective settings; ``fresh``: new limits start with full burst and credit."""
        effective = self.effective(disk)
        disk.limits.set(effective.limits(), fresh=fresh)
        # A disk without a minimum of its own waits in the share of its aggregated policy.
        policy = shared_policy(effective, disk.policy_id, self.policies)
        self._device.assign(disk.attachment, effective, policy)
        group = None if disk.policy_id is None else self._group_limits.get(disk.policy_id)
        for flow in self.flows:
            if self.disks.get(flow.disk) is disk:
                flow.throttle.set_group(group)

    # ---- policies ----

    def policy(self, name: str) -> Policy:
        """The policy with that name or id.

        Raises:
            NotFoundError: there is none.
        """
        with self.lock:
            for policy in self.policies.values():
                if name in {policy.name, str(policy.policy_id)}:
                    return policy
        raise NotFoundError(f"there is no policy {name!r}", hint="see vhdx qos policy list")

    def change_policy(
        self, name: str, change: Callable[[Policy | None], Policy]
    ) -> tuple[Policy, str | None]:
        """Replaces a policy with what ``change`` returns; see :meth:`Domain.change_policy`."""
        with self._change_lock:
            try:
                found = self.policy(name)
            except NotFoundError:
                found = None
            policy = change(found)
            old = self.policies.get(policy.policy_id)
            if old is not None and old.kind is not policy.kind:
                raise InvalidArgumentError(
                    f"policy {old.name!r} is {old.kind}, and that cannot change",
                    hint="make another policy",
                )
            self._check_name(policy)
            policies = self.policies | {policy.policy_id: policy}
            warning = self._admit({}, policies)
            self._save({}, policies)
            with self.lock:
                self._keep(policy)
                self._apply_policy(policy.policy_id)
            return policy, warning

    def remove_policy(self, name: str) -> list[str]:
        """Removes a policy; see :meth:`Domain.remove_policy`."""
        with self._change_lock:
            policy = self.policy(name)
            left = {key: each for key, each in self.policies.items() if each is not policy}
            warning = self._device.warning(reservations(self._desired(), left))
            _warn(warning)  # the policy limited minimums; it is removed anyway
            self._save({}, left)
            with self.lock:
                del self.policies[policy.policy_id]
                group = self._group_limits.get(policy.policy_id)
                if group is not None:
                    group.set({})
                self._apply_policy(policy.policy_id)
                names = [n for n, d in self.disks.items() if d.policy_id == policy.policy_id]
            for name in names:
                _log.warning("QoS: %s runs on without policy %r", name, policy.name)
            return names

    def _check_name(self, policy: Policy) -> None:
        for other in self.policies.values():
            if other.name == policy.name and other.policy_id != policy.policy_id:
                raise ExistsError(f"there is a policy {policy.name!r} already")

    def _keep(self, policy: Policy) -> None:
        self.policies[policy.policy_id] = policy
        if policy.kind is PolicyKind.AGGREGATED:
            limits = self._group_limits.get(policy.policy_id)
            if limits is None:
                limits = self._group_limits[policy.policy_id] = plane.Limits(self._pacing, self._unit)
            self._group_watches.setdefault(policy.policy_id, Watch()).title = f"policy {policy.name}"
            limits.set(policy.settings.limits())

    def _apply_policy(self, policy_id: UUID) -> None:
        for disk in self.disks.values():
            if disk.policy_id == policy_id:
                self._apply(disk)
        self._device.adapt(self.reservations())

    def _save(self, changed: Mapping[str, DesiredQos], policies: Mapping[UUID, Policy]) -> None:
        """Saves all disks, with ``changed`` (by path) in place of their settings, and policies."""
        if self._closed:
            raise ClosedError("the server is closing")
        if self._store is not None:
            with self.lock:
                desired = {d.path: DesiredQos(d.settings, d.policy_id) for d in self.disks.values()}
            self._store.update(desired | dict(changed), policies.values())

    # ---- flows ----

    def connect(self, name: str, initiator: str) -> Flow:
        """Creates the flow of an initiator to a disk, which lasts until :meth:`disconnect`."""
        with self.lock:
            disk = self.disk(name)
            group = None if disk.policy_id is None else self._group_limits.get(disk.policy_id)
            device = disk.attachment.device
            throttle = plane.Throttle(device, self._pacing, disk.limits, group)
            flow = Flow(name, initiator, throttle, plane.Meter(self._unit))
            self.flows.append(flow)
            return flow

    def disconnect(self, flow: Flow) -> None:
        """Removes the flow of an initiator that has left; its counts stay in those of its disk."""
        with self.lock:
            self.flows.remove(flow)
            disk = self.disks[flow.disk]
            did = flow.meter.read().numbers()
            disk.departed = [a + b for a, b in zip(disk.departed, did, strict=True)]

    # ---- for the sampler, under the lock ----

    def watched(self) -> Iterator[Watched]:
        """Yields each disk and each aggregated policy.

        Those that no longer have a minimum or disks are included, so that their alerts can end.
        """
        paths: dict[str, list[str]] = {}
        for name, disk in self.disks.items():
            paths.setdefault(disk.path, []).append(name)
        for names in paths.values():
            disk = self.disks[names[0]]
            minimum = self.effective(disk).minimum_iops
            yield Watched(names[0], names, minimum, disk.watch, disk.attachment.share)
        for policy_id, watch in self._group_watches.items():
            policy = self.policies.get(policy_id)
            mine = [
                name
                for name, disk in self.disks.items()
                if disk.policy_id == policy_id
                and shared_policy(disk.settings, policy_id, self.policies) is not None
            ]
            minimum = policy.settings.minimum_iops if policy is not None and mine else None
            yield Watched(watch.title, mine, minimum, watch, self._device.policy_share(policy_id))

    def close(self) -> None:
        """Refuses all further changes and releases the QoS file, which another server may use."""
        with self._change_lock:
            self._closed = True
            if self._store is not None:
                self._store.close()


def _warn(warning: str | None) -> None:
    if warning is not None:
        _log.warning("QoS: %s", warning)
