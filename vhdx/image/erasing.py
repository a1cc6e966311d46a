# SPDX-License-Identifier: MIT
"""Block devices that get a new image: what they held must not show, or be taken for an image."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vhdx.errors import VhdxError
from vhdx.units import MIB

if TYPE_CHECKING:
    from vhdx import plane

__all__ = ["abandon", "erase"]

_FOOTER = 4096  # a VHD has its footer in the last 512 bytes


def erase(leaf: plane.Device, length: int) -> None:
    """Makes the first ``length`` bytes read zeros, unless the leaf is a new file.

    What identifies an old image goes first, durably: after a crash the device holds no image. Call it
    when everything that may be refused was checked.
    """
    if not leaf.is_block_device:
        return
    leaf.zero(0, min(leaf.size, MIB))
    leaf.zero(max(0, leaf.size - _FOOTER), min(leaf.size, _FOOTER))
    leaf.flush()
    leaf.is_erased = True
    leaf.zero(0, length)


def abandon(leaf: plane.Device) -> None:
    """After a failure: a device that was erased holds no image, rather than a part of one."""
    if leaf.is_erased:
        with contextlib.suppress(VhdxError):
            leaf.zero(0, min(leaf.size, MIB))
            leaf.flush()
