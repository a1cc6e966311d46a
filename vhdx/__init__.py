# SPDX-License-Identifier: MIT
"""vhdx: real VHDX images on Linux, read, written, created, converted and served.

    import vhdx

    vhdx.create("disk.vhdx", size=64 << 30)
    with vhdx.open("disk.vhdx", "r+") as disk:
        disk.pwrite(b"hello", 0)
    with vhdx.serve({"disk": "disk.vhdx"}) as server:
        print(server.uri)

Sizes and offsets are bytes; buffers are anything with the buffer protocol. Every failure is a
:class:`VhdxError` with ``path``, ``offset`` and ``reason``.
"""

from vhdx.control import compact, info, resize, serve, snapshot
from vhdx.errors import (
    ClosedError,
    DamagedError,
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    MissingParentError,
    NoSpaceError,
    NotFoundError,
    PoisonedError,
    RangeError,
    ReadOnlyError,
    Reason,
    UnsupportedError,
    VhdxError,
)
from vhdx.image import (
    Disk,
    Extent,
    ExtentState,
    Finding,
    Report,
    View,
    check,
    convert,
    create,
    merge,
    open,
    rebase,
    repair,
    undo,
)
from vhdx.nbd import Limits, Server

__all__ = [
    "ClosedError",
    "DamagedError",
    "Disk",
    "ExistsError",
    "Extent",
    "ExtentState",
    "Finding",
    "HostIOError",
    "InUseError",
    "InvalidArgumentError",
    "Limits",
    "MissingParentError",
    "NoSpaceError",
    "NotFoundError",
    "PoisonedError",
    "RangeError",
    "ReadOnlyError",
    "Reason",
    "Report",
    "Server",
    "UnsupportedError",
    "VhdxError",
    "View",
    "check",
    "compact",
    "convert",
    "create",
    "info",
    "merge",
    "open",
    "rebase",
    "repair",
    "resize",
    "serve",
    "snapshot",
    "undo",
]

__version__ = "0.1.0"
