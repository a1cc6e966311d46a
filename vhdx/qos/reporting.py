# SPDX-License-Identifier: MIT
"""Makes the report of a server's QoS."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vhdx.qos.monitor import WINDOWS, Figures, History
from vhdx.qos.report import DiskReport, FlowReport, QosReport

if TYPE_CHECKING:
    from vhdx.qos.flows import DiskState, Flow
    from vhdx.qos.registry import Registry
    from vhdx.qos.sampler import Sampler
    from vhdx.qos.shared_device import SharedDevice

__all__ = ["report"]


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
