# SPDX-License-Identifier: MIT
"""vhdx: real VHDX images on Linux, read, written, created, converted and served.

    import vhdx

    vhdx.create("disk.vhdx", size=64 << 30)
    with vhdx.open("disk.vhdx", "r+") as disk:
        disk.pwrite(b"hello", 0)
    with vhdx.serve({"disk": "disk.vhdx"}) as server:
        print(server.uri)

Sizes and offsets are in bytes. A buffer is any object with the buffer protocol. Every failure is a
:class:`VhdxError` with ``path``, ``offset`` and ``reason``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vhdx import lazy

if TYPE_CHECKING:
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
    from vhdx.front.nbd import Server
    from vhdx.host import Limits
    from vhdx.image import (
        Disk,
        Extent,
        ExtentState,
        Finding,
        Report,
        View,
        check,
        create,
        merge,
        open,
        rebase,
        repair,
        undo,
    )
    from vhdx.image.converting import convert
    from vhdx.spaces import DiskSpec, Pool

__all__ = [
    "ClosedError",
    "DamagedError",
    "Disk",
    "DiskSpec",
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
    "Pool",
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
    "mounted",
    "open",
    "rebase",
    "repair",
    "resize",
    "serve",
    "snapshot",
    "undo",
]

__version__ = "0.1.0"

_HOMES = {
    "vhdx.control": "compact info resize serve snapshot",
    "vhdx.image": (
        "Disk Extent ExtentState Finding Report View "
        "check convert create merge open rebase repair undo"
    ),
    "vhdx.front.nbd": "Server",
    "vhdx.mounting": "mounted",
    "vhdx.host": "Limits",
    "vhdx.spaces": "DiskSpec Pool",
    "vhdx.errors": " ".join(name for name in __all__ if name.endswith("Error")) + " Reason",
}
_find = lazy.exports(__name__, _HOMES)
_PARTS = {
    "cli",
    "control",
    "errors",
    "files",
    "format",
    "front",
    "host",
    "image",
    "mounting",
    "plane",
    "qos",
    "spaces",
    "units",
    "volume",
}


def __getattr__(name: str) -> Any:
    """Imports a name at its first use: few programs need the whole package."""
    return importlib.import_module(f"vhdx.{name}") if name in _PARTS else _find(name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_PARTS})
