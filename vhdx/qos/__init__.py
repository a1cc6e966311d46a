# SPDX-License-Identifier: MIT
"""Storage QoS: limits and minimums of disks, and measured figures, in the terms that Windows uses.

:mod:`vhdx.qos.domain` is the QoS of one server. :mod:`vhdx.qos.policy` has settings and policies as
data, :mod:`vhdx.qos.store` saves them in a file, and :mod:`vhdx.qos.registry` applies them to
disks. :mod:`vhdx.qos.shared_device` schedules the disks so that minimums are kept, and
:mod:`vhdx.qos.admission` checks that they can be kept. :mod:`vhdx.qos.sampler` takes samples,
:mod:`vhdx.qos.monitor` evaluates them, :mod:`vhdx.qos.reporting` reports them, and
:mod:`vhdx.qos.alerts` delivers alerts about missed minimums. The data plane's part is in
``csrc/qos/throttle.h`` and ``csrc/qos/schedule.h``.
"""

from vhdx.qos.domain import SUBSCRIPTION_SECONDS, Domain
from vhdx.qos.flows import Flow
from vhdx.qos.policy import LARGEST_IOPS, NORMALISED_UNIT, Policy, PolicyKind, Settings
from vhdx.qos.report import DeviceReport, DiskReport, FlowReport, QosReport
from vhdx.qos.shared_device import Scheduling
from vhdx.qos.store import Store

__all__ = [
    "LARGEST_IOPS",
    "NORMALISED_UNIT",
    "SUBSCRIPTION_SECONDS",
    "DeviceReport",
    "DiskReport",
    "Domain",
    "Flow",
    "FlowReport",
    "Policy",
    "PolicyKind",
    "QosReport",
    "Scheduling",
    "Settings",
    "Store",
]
