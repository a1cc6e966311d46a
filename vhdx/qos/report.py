# SPDX-License-Identifier: MIT
"""The QoS report of a server, as data: policies, disks, flows and the shared device.

``vhdx qos show --json`` and ``vhdx top --json`` print these classes, and control sockets send them.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from vhdx.qos.monitor import Figures, Status
from vhdx.qos.policy import Policy, Settings

__all__ = ["DeviceReport", "DiskReport", "FlowReport", "QosReport"]


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
