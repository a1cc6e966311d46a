# SPDX-License-Identifier: MIT
"""The Python interface to the C data plane; no other package calls C.

It has devices, page tables, the thread pool and NBD connections as Python objects, and converts the
error codes of C to exceptions. It knows no on-disk format. The contracts of the devices are in
``csrc/core/device.h`` and ``csrc/map/map.h``.
"""

from vhdx.plane.callback import Backend, Callback
from vhdx.plane.connection import CONNECTION_BYTES, Connection, ConnectionCounters
from vhdx.plane.device import (
    DATA,
    HOLE,
    ZERO,
    Device,
    File,
    Injector,
    Level,
    Memory,
    Operation,
    Pool,
    RawExtent,
    Step,
    Switch,
    shared_pool,
    together,
)
from vhdx.plane.failures import E_CANCELLED as CANCELLED
from vhdx.plane.failures import E_FORKED as FORKED
from vhdx.plane.failures import describe as describe_failure
from vhdx.plane.gil import serving
from vhdx.plane.map import (
    CHUNK_PAGES,
    TAG_ZERO,
    WATCHED,
    Accesses,
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
from vhdx.plane.schedule import (
    DEEPEST,
    LARGEST_WEIGHT,
    PIECE,
    Delay,
    Load,
    Model,
    ModelKind,
    Scheduled,
    Scheduler,
    Share,
)

__all__ = [
    "CANCELLED",
    "CHUNK_PAGES",
    "CONNECTION_BYTES",
    "DATA",
    "DEEPEST",
    "FORKED",
    "HOLE",
    "LARGEST_RATE",
    "LARGEST_WEIGHT",
    "METER_NUMBERS",
    "PIECE",
    "TAG_ZERO",
    "WATCHED",
    "ZERO",
    "Accesses",
    "Backend",
    "Callback",
    "Changes",
    "Clock",
    "Connection",
    "ConnectionCounters",
    "Delay",
    "Device",
    "FaultHandler",
    "File",
    "Injector",
    "Kind",
    "Level",
    "Limit",
    "LimitKind",
    "Limits",
    "Load",
    "Map",
    "Memory",
    "Meter",
    "MeterFacts",
    "Model",
    "ModelKind",
    "Operation",
    "Pacing",
    "Pool",
    "RawExtent",
    "Scheduled",
    "Scheduler",
    "Sectors",
    "Share",
    "Step",
    "Switch",
    "Throttle",
    "describe_failure",
    "entries",
    "fields",
    "quantile",
    "serving",
    "shared_pool",
    "together",
]
