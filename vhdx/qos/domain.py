# SPDX-License-Identifier: MIT
"""The QoS of one server: the settings of its disks, which the data plane enforces, and figures.

:class:`Registry` has disks, policies and flows. :class:`SharedDevice` schedules the device that the
disks share and reports which minimums it can keep. :class:`Sampler` takes samples, :class:`Alerts`
delivers alerts about missed minimums, and :mod:`vhdx.qos.reporting` makes reports. Any thread may
call any method.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.errors import ClosedError, InvalidArgumentError
from vhdx.qos.alerts import Alerts
from vhdx.qos.policy import NORMALISED_UNIT, Policy, Settings
from vhdx.qos.registry import Registry
from vhdx.qos.reporting import report
from vhdx.qos.sampler import Sampler
from vhdx.qos.shared_device import Scheduling, SharedDevice

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable, Mapping

    from vhdx.qos.flows import Flow
    from vhdx.qos.monitor import Alert
    from vhdx.qos.report import QosReport
    from vhdx.qos.store import Store

__all__ = ["SUBSCRIPTION_SECONDS", "Domain"]

SUBSCRIPTION_SECONDS = 310.0
"""How long a subscription lasts by default: longer than the longest window of figures."""


class Domain:
    """The QoS of one server.

    Args:
        pool: the thread pool of the server.
        unit: bytes of a normalised I/O, 512 to 1 MiB.
        store: the QoS file that settings are read from and saved to.
        hook: a command that is run for each alert; environment variables describe the alert.
        scheduling: how minimums are kept; with None they are only watched.
        sizes: sizes in bytes of the disks that will be added; only a model needs them.
        clock: a virtual clock for experiments; then only :meth:`advance` takes samples.

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

    # ---- settings and policies ----

    def add_disk(
        self,
        name: str,
        path: str,
        device: plane.Device,
        changes: Settings | Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a disk that is served from now on.

        Args:
            name: the name of the export.
            path: the path of its image; exports of one image share settings and limits.
            device: the device that its requests go to.
            changes: changes to the settings in the store. In a :class:`Settings`, only fields that
                differ from their default change a setting.
        """
        self._registry.add_disk(name, path, device, changes)
        self._sampler.begin()

    def begin(self) -> None:
        """Saves the settings once all disks are added, and logs warnings.

        Raises:
            HostIOError, NoSpaceError: the QoS file cannot be written.
        """
        self._registry.begin()

    def set_disk(
        self, name: str, changes: Mapping[str, Any], policy: str | None = None
    ) -> str | None:
        """Changes the settings of a disk while it is served.

        Args:
            name: the name of the disk.
            changes: settings by name; None removes a setting.
            policy: name or id of its policy; "" removes the policy, None keeps it.

        Returns:
            A warning when not all minimums can be kept but the change is allowed, else None.

        Raises:
            NotFoundError: no such disk or policy.
            InvalidArgumentError: invalid settings, or minimums above a known capacity.
            HostIOError, NoSpaceError: the QoS file cannot be written. Then nothing changes.
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
        """Creates a policy, or changes the one with the same id; it applies to its disks at once.

        Returns:
            A warning or None, as :meth:`set_disk` does.

        Raises:
            ExistsError: another policy has this name.
            InvalidArgumentError: the policy has another kind, which cannot change, or its minimum
                cannot be kept.
            HostIOError, NoSpaceError: the QoS file cannot be written. Then nothing changes.
        """
        return self.change_policy(policy.name, lambda _: policy)[1]

    def change_policy(
        self, name: str, change: Callable[[Policy | None], Policy]
    ) -> tuple[Policy, str | None]:
        """Like :meth:`set_policy`, with the policy that ``change`` returns.

        ``change`` gets the policy with this name or id, or None. No other change runs meanwhile.
        """
        changed = self._registry.change_policy(name, change)
        self._sampler.begin()
        return changed

    def remove_policy(self, name: str) -> list[str]:
        """Removes a policy. Its disks keep only their own settings until it is created again.

        Returns:
            The names of those disks.
        """
        return self._registry.remove_policy(name)

    # ---- flows ----

    def connect(self, name: str, initiator: str) -> Flow:
        """Creates the flow of an initiator to a disk, which lasts until :meth:`disconnect`.

        Raises:
            NotFoundError: there is no such disk.
        """
        with self._registry.lock:
            flow = self._registry.connect(name, initiator)
            self._sampler.add(flow)
            return flow

    def disconnect(self, flow: Flow) -> None:
        """Removes the flow of an initiator that has left; its counts stay in those of its disk."""
        self._registry.disconnect(flow)

    def pace(self, size: int) -> None:
        """Blocks until background work may start ``size`` bytes of I/O."""
        self._device.pace(size)

    # ---- figures and alerts ----

    def subscribe(self, seconds: float = SUBSCRIPTION_SECONDS) -> None:
        """Keeps sampling on for at least ``seconds`` from now.

        Without a subscription, figures are sampled only while a disk or policy has a minimum.
        """
        self._sampler.subscribe(seconds)

    def report(self) -> QosReport:
        """Reports policies, disks and flows, with all figures sampled so far.

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
        """Advances the virtual clock, and takes samples and delivers alerts as they become due.

        Raises:
            InvalidArgumentError: the clock is not virtual.
        """
        self._sampler.advance(seconds)

    def close(self) -> None:
        """Ends sampling, changes and alerts, and releases the QoS file."""
        self._closed.set()
        self._device.close()
        self._sampler.close()
        self._alerts.close()
        self._registry.close()
