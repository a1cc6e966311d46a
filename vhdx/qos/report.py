# SPDX-License-Identifier: MIT
"""What a server reports of QoS: policies, disks, flows and the shared device, as data.

The same classes are what ``vhdx qos show --json`` and ``vhdx top --json`` print, and what goes over
a control socket.
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
        keeps_minimums: whether there is a scheduler that keeps them.
        depth: requests that it lets through at a time; None without a scheduler.
        model: hdd, ssd or nvme where the device is modelled.
        capacity_iops: normalised; None while it is not known.
        capacity_measured: the capacity was measured, and not given or modelled.
        reserved_iops: the sum of minimums, normalised.
        admitted: whether the capacity carries them, as far as it is known.
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
    """A disk under one name.

    Attributes:
        disk: its name.
        path: of its image.
        policy_id: of its policy, which may not exist.
        status: whether it gets its minimum.
        settings: its own.
        effective: what counts, with its policy.
        waiting: requests that wait in throttles or for a slot.
        credits: by limit, the units or bytes that could pass now; negative is owed.
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
    """What one initiator does to one disk.

    Attributes:
        disk: the name of the disk.
        initiator: who it is.
        status: of the disk.
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
        pid: its process.
        unit: bytes of a normalised I/O.
        sampled_seconds: how long figures have been sampled without a break; 0: they are not.
        scheduling: the shared device.
        policies, disks, flows: those there are.
    """

    pid: int
    unit: int
    sampled_seconds: float
    scheduling: DeviceReport
    policies: list[Policy]
    disks: list[DiskReport]
    flows: list[FlowReport]


def report(registry: Registry, sampler: Sampler, device: SharedDevice, unit: int) -> QosReport:
    """What there is now, all of one moment."""
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
