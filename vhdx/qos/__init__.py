# SPDX-License-Identifier: MIT
"""Storage QoS: limits and minimums of disks, and what they really get, in Windows' vocabulary.

:mod:`vhdx.qos.domain` is the whole of one server. Its parts: :mod:`vhdx.qos.policy` is what is wanted
as data, :mod:`vhdx.qos.store` keeps that in a file, :mod:`vhdx.qos.registry` applies it to disks,
:mod:`vhdx.qos.shared_device` keeps minimums and :mod:`vhdx.qos.admission` proves that they can be
kept, :mod:`vhdx.qos.sampler` takes figures, :mod:`vhdx.qos.monitor` evaluates them,
:mod:`vhdx.qos.report` shows them, and :mod:`vhdx.qos.alerts` tells of missed minimums. The data
plane's part is ``csrc/qos/throttle.h`` and ``csrc/qos/schedule.h``.
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
