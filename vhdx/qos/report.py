# SPDX-License-Identifier: MIT
"""The QoS report of a server, as data: policies, disks, flows and the shared device.

``vhdx qos show --json`` and ``vhdx top --json`` print these classes, and control sockets send them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from vhdx.qos.monitor import WINDOWS, Figures, History, Status
from vhdx.qos.policy import Policy, Settings

if TYPE_CHECKING:
    from vhdx.qos.flows import DiskState, Flow
    from vhdx.qos.registry import Registry
    from vhdx.qos.sampler import Sampler
    from vhdx.qos.shared_device import SharedDevice

__all__ = ["DeviceReport", "DiskReport", "FlowReport", "QosReport", "report"]


@dataclass(frozen=True)
class DeviceReport:
    """The device that all disks of a server share.

    Attributes:
        keeps_minimums: whether a scheduler keeps minimums.
        depth: the number of scheduler slots; None without a scheduler.
        model: hdd, ssd or nvme; None if the device is not modelled.
        capacity_iops: normalised; None while it is not known.
        capacity_measured: whether the capacity was measured, not given or modelled.
        reserved_iops: the sum of minimums, normalised.
        admitted: whether the capacity is sufficient for the minimums; True while it is not known.
        waiting: requests that wait for a slot.
        below: pieces of requests that hold a slot.
    """

    keeps_minimums: bool
    depth: int | None
    model: str | None
    capacity_iops: float | None
    capacity_measured: bool
    reserved_iops: int
    admitted: bool
    waiting: int
    below: int


@dataclass(frozen=True)
class DiskReport:
    """One export of a disk.

    Attributes:
        disk: the name of the export.
        path: the path of its image.
        policy_id: the id of its policy, which may not exist.
        status: whether it gets its minimum.
        settings: its own settings.
        effective: its own settings combined with those of a dedicated policy.
        waiting: requests that wait in throttles or for a slot.
        credits: by limit, the units or bytes that could pass now; negative means debt.
        windows: figures by window in seconds: "1", "60" and "300".
    """

    disk: str
    path: str
    policy_id: UUID | None
    status: Status
    settings: Settings
    effective: Settings
    waiting: int
    credits: dict[str, int]
    windows: dict[str, Figures]


@dataclass(frozen=True)
class FlowReport:
    """The requests of one initiator to one disk.

    Attributes:
        disk: the name of the disk.
        initiator: a name for the client, such as its process or address.
        status: the status of the disk.
        waiting, waiting_units: requests that wait in its throttle, and the units that they cost.
        windows: figures by window in seconds: "1", "60" and "300".
    """

    disk: str
    initiator: str
    status: Status
    waiting: int
    waiting_units: int
    windows: dict[str, Figures]


@dataclass(frozen=True)
class QosReport:
    """The QoS of a server.

    Attributes:
        pid: the process id of the server.
        unit: bytes of a normalised I/O.
        sampled_seconds: how long sampling has run without a break; 0 if it does not run.
        scheduling: the shared device.
        policies, disks, flows: all of the server.
    """

    pid: int
    unit: int
    sampled_seconds: float
    scheduling: DeviceReport
    policies: list[Policy]
    disks: list[DiskReport]
    flows: list[FlowReport]


def report(registry: Registry, sampler: Sampler, device: SharedDevice, unit: int) -> QosReport:
    """Makes a consistent report of the current state."""
    with registry.lock:
        return QosReport(
            os.getpid(),
            unit,
            sampler.sampled_seconds(),
            device.report(registry.reservations()),
            list(registry.policies.values()),
            [_disk(registry, name, disk) for name, disk in registry.disks.items()],
            [_flow(registry, flow) for flow in registry.flows],
        )


def _windows(history: History) -> dict[str, Figures]:
    return {f"{window:g}": history.figures(window) for window in WINDOWS}


def _disk(registry: Registry, name: str, disk: DiskState) -> DiskReport:
    effective = registry.effective(disk)
    levels = disk.limits.levels()
    held = sum(flow.throttle.waiting()[0] for flow in registry.flows if flow.disk == name)
    return DiskReport(
        disk=name,
        path=disk.path,
        policy_id=disk.policy_id,
        status=registry.status(disk),
        settings=disk.settings,
        effective=effective,
        waiting=held + disk.attachment.waiting(),
        credits={kind.name.lower(): levels[kind] for kind in effective.limits()},
        windows=_windows(disk.history),
    )


def _flow(registry: Registry, flow: Flow) -> FlowReport:
    waiting, units = flow.throttle.waiting()
    return FlowReport(
        disk=flow.disk,
        initiator=flow.initiator,
        status=registry.status(registry.disks[flow.disk]),
        waiting=waiting,
        waiting_units=units,
        windows=_windows(flow.history),
    )
