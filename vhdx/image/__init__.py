# SPDX-License-Identifier: MIT
"""Image formats: opening, creating and converting disks.

This package defines what the bytes of a host file mean. It never moves them: the plane does.
"""

from typing import TYPE_CHECKING

from vhdx import lazy

if TYPE_CHECKING:
    from vhdx.image.converting import convert
    from vhdx.image.creation import create_disk as create
    from vhdx.image.disk import Disk, Extent, ExtentState
    from vhdx.image.opening import open_disk as open
    from vhdx.image.opening import snapshot
    from vhdx.image.vhdx.checking import Finding, Report, check
    from vhdx.image.vhdx.merging import compact, merge, rebase
    from vhdx.image.vhdx.repairing import repair, undo
    from vhdx.image.vhdx.view import View

__all__ = [
    "Disk",
    "Extent",
    "ExtentState",
    "Finding",
    "Report",
    "View",
    "check",
    "compact",
    "convert",
    "create",
    "merge",
    "open",
    "rebase",
    "repair",
    "snapshot",
    "undo",
]

__getattr__ = lazy.exports(
    __name__,
    {
        "vhdx.image.vhdx.checking": "Finding Report check",
        "vhdx.image.converting": "convert",
        "vhdx.image.creation": "create_disk:create",
        "vhdx.image.disk": "Disk Extent ExtentState",
        "vhdx.image.vhdx.merging": "compact merge rebase",
        "vhdx.image.opening": "open_disk:open snapshot",
        "vhdx.image.vhdx.repairing": "repair undo",
        "vhdx.image.vhdx.view": "View",
    },
)
