# SPDX-License-Identifier: MIT
"""The QoS of one server: what is wanted of its disks, kept by the data plane, and what they get.

The parts: :class:`Registry` has disks, policies and flows, :class:`SharedDevice` schedules what the
disks share and says what it can carry, :class:`Sampler` takes figures, :class:`Alerts` tells of
missed minimums, and :mod:`vhdx.qos.report` shows it all. Any thread may call any method.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.errors import ClosedError, InvalidArgumentError
from vhdx.qos.alerts import Alerts
from vhdx.qos.policy import NORMALISED_UNIT, Policy, Settings
from vhdx.qos.registry import Registry
from vhdx.qos.report import QosReport, report
from vhdx.qos.sampler import Sampler
from vhdx.qos.shared_device import Scheduling, SharedDevice

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable, Mapping

    from vhdx.qos.flows import Flow
    from vhdx.qos.monitor import Alert
    from vhdx.qos.store import Store

__all__ = ["SUBSCRIPTION_SECONDS", "Domain"]

SUBSCRIPTION_SECONDS = 310.0
"""How long a subscription lasts by default: longer than the longest window of figures."""


class Domain:
    """The QoS of one server.

    Args:
        pool: the server's.
        unit: bytes of a normalised I/O, 512 to 1 MiB.
        store: where settings are kept, and where they are taken from.
        hook: a command that is run for each alert, described in its environment.
        scheduling: how minimums are kept; None only watches them.
        sizes: of the disks that will be added, bytes; for a model.
        clock: a virtual one, for experiments: nothing is sampled but by :meth:`advance`.

    Raises:
        InvalidArgumentError: a unit out of range.
        DamagedError: the store's content cannot be applied.
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
        self.unit = unit
        self._device = SharedDevice(scheduling or Scheduling(), pool, unit, sizes, clock)
        self._registry = Registry(plane.Pacing(pool, clock), unit, store, self._device)
        self._alerts = Alerts(hook)
        self._sampler = Sampler(self._registry, self._device, self._alerts, clock)
        self._closed = threading.Event()

    # ---- what is wanted ----

    def add_disk(
        self,
        name: str,
        path: str,
        device: plane.Device,
        changes: Settings | Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a disk that is served from now on.

        Args:
            name: of the export.
            path: of its image; disks of one image share settings and limits.
            device: what its requests go to.
            changes: made to what the store says. :class:`Settings` change what they do not leave at
                its default.
        """
        self._registry.add_disk(name, path, device, changes)
        self._sampler.begin()

    def begin(self) -> None:
        """Saves what was given for the disks, once all are added, and logs warnings.

        Raises:
            HostIOError, NoSpaceError: the file cannot be written.
        """
        self._registry.begin()

    def set_disk(
        self, name: str, changes: Mapping[str, Any], policy: str | None = None
    ) -> str | None:
        """Changes what is wanted of a disk, live.

        Args:
            name: of the disk.
            changes: settings by name; None takes one away.
            policy: name or id of its policy; "" for none, None leaves it.

        Returns:
            A warning where the minimums cannot all be kept by the measured capacity, else None.

        Raises:
            NotFoundError: no such disk or policy.
            InvalidArgumentError: settings that cannot be, or minimums above a known capacity.
            HostIOError, NoSpaceError: the file cannot be written. Nothing is changed then.
        """
        warning = self._registry.set_disk(name, changes, policy)
        self._sampler.begin()
        return warning

    def policy(self, name: str) -> Policy:
        """The policy of that name or id.

        Raises:
            NotFoundError: there is none.
        """
        return self._registry.policy(name)

    def set_policy(self, policy: Policy) -> str | None:
        """Makes a policy, or changes one with the same id; its disks follow at once.

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
        """Like :meth:`set_policy`, with the policy that ``change`` makes of the present one.

        ``change`` gets the policy of this name or id, or None. Nothing else changes meanwhile.
        """
        changed = self._registry.change_policy(name, change)
        self._sampler.begin()
        return changed

    def remove_policy(self, name: str) -> list[str]:
        """Removes a policy. Its disks keep only their own limits, until it comes back.

        Returns:
            The names of those disks.
        """
        return self._registry.remove_policy(name)

    # ---- flows ----

    def connect(self, name: str, initiator: str) -> Flow:
        """A flow of an initiator to a disk, until :meth:`disconnect`.

        Raises:
            NotFoundError: there is no such disk.
        """
        with self._registry.lock:
            flow = self._registry.connect(name, initiator)
            self._sampler.add(flow)
            return flow

    def disconnect(self, flow: Flow) -> None:
        """Removes a flow whose initiator has left; what it did still counts for its disk."""
        self._registry.disconnect(flow)

    def pace(self, size: int) -> None:
        """Blocks until background work may do ``size`` bytes of I/O."""
        self._device.pace(size)

    # ---- what they get ----

    def subscribe(self, seconds: float = SUBSCRIPTION_SECONDS) -> None:
        """Has figures sampled for at least so many seconds from now.

        Without a subscription, figures are sampled only while a disk or policy has a minimum.
        """
        self._sampler.subscribe(seconds)

    def report(self) -> QosReport:
        """Policies, disks and flows, with their figures as far as they are sampled.

        Raises:
            ClosedError: the server is closing.
        """
        if self._closed.is_set():
            raise ClosedError("the server is closing")
        return report(self._registry, self._sampler, self._device, self.unit)

    def listening(
        self, listener: Callable[[Alert], None]
    ) -> contextlib.AbstractContextManager[list[Alert]]:
        """See :meth:`Alerts.listening`."""
        return self._alerts.listening(listener)

    def advance(self, seconds: float) -> None:
        """Lets virtual time pass, with the samples and alerts that come in it.

        Raises:
            InvalidArgumentError: time is real.
        """
        self._sampler.advance(seconds)

    def close(self) -> None:
        """Ends sampling, changes and alerts, and gives the QoS file back."""
        self._closed.set()
        self._device.close()
        self._sampler.close()
        self._alerts.close()
        self._registry.close()
