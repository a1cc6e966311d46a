# SPDX-License-Identifier: MIT
"""The only Python face of the C data plane.

Owns: devices, page tables, the thread pool and NBD connections as Python objects, and the way from
C's error codes to exceptions. Knows nothing of any on-disk format. The contracts of the devices
stand in ``csrc/device.h`` and ``csrc/map.h``.
"""

from vhdx.plane.callback import Backend, Callback
from vhdx.plane.check import E_FORKED as FORKED
from vhdx.plane.connection import Connection, ConnectionCounters
from vhdx.plane.device import (
    DATA,
    HOLE,
    ZERO,
    Device,
    File,
    Hold,
    Memory,
    Operation,
    Pool,
    Step,
    Switch,
    default_pool,
)
from vhdx.plane.map import (
    CHUNK_PAGES,
    TAG_ZERO,
    Changes,
    FaultHandler,
    Kind,
    Map,
    Sectors,
    entries,
    fields,
)
from vhdx.plane.pacing import (
    LARGEST_RATE,
    METER_NUMBERS,
    Clock,
    Limit,
    LimitKind,
    Limits,
    Meter,
    MeterFacts,
    Pacing,
    Throttle,
    quantile,
)
from vhdx.plane.turn import serving

__all__ = [
    "CHUNK_PAGES",
    "DATA",
    "FORKED",
    "HOLE",
    "LARGEST_RATE",
    "METER_NUMBERS",
    "TAG_ZERO",
    "ZERO",
    "Backend",
    "Callback",
    "Changes",
    "Clock",
    "Connection",
    "ConnectionCounters",
    "Device",
    "FaultHandler",
    "File",
    "Hold",
    "Kind",
    "Limit",
    "LimitKind",
    "Limits",
    "Map",
    "Memory",
    "Meter",
    "MeterFacts",
    "Operation",
    "Pacing",
    "Pool",
    "Sectors",
    "Step",
    "Switch",
    "Throttle",
    "default_pool",
    "entries",
    "fields",
    "quantile",
    "serving",
]
