# SPDX-License-Identifier: MIT
"""Storage QoS: limits, minimums and what disks really get, in Windows' vocabulary.

:mod:`vhdx.qos.policy` has what is wanted as data, :mod:`vhdx.qos.store` keeps it in a file,
:mod:`vhdx.qos.domain` applies it to the disks of a server, :mod:`vhdx.qos.scheduling` keeps
minimums, and :mod:`vhdx.qos.monitor` watches what flows get, :mod:`vhdx.qos.alerts`
tells of it. The data plane's part is ``csrc/qos/throttle.h`` and ``csrc/qos/schedule.h``.
"""

from vhdx.qos.domain import Domain
from vhdx.qos.flows import Flow
from vhdx.qos.policy import LARGEST_IOPS, NORMALISED_UNIT, Policy, PolicyKind, Settings
from vhdx.qos.scheduling import Scheduling
from vhdx.qos.store import Store

__all__ = [
    "LARGEST_IOPS",
    "NORMALISED_UNIT",
    "Domain",
    "Flow",
    "Policy",
    "PolicyKind",
    "Scheduling",
    "Settings",
    "Store",
]
