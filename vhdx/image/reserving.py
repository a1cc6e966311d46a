# SPDX-License-Identifier: MIT
"""Allocates space in a new file before data are written there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx.errors import Reason, VhdxError
from vhdx.units import MIB

if TYPE_CHECKING:
    from vhdx import plane
    from vhdx.interrupts import Cancel, Progress

__all__ = ["reserve"]

_AT_ONCE = 1 << 30


def reserve(
    leaf: plane.Device,
    start: int,
    end: int,
    *,
    sparse: bool,
    progress: Progress | None,
    cancel: Cancel | None,
) -> None:
    """Allocates the space from ``start`` to ``end`` (bytes): written with zeros unless ``sparse``.

    Raises:
        VhdxError: reason CANCELLED when ``cancel`` returned True.
    """
    zeros = bytes(4 * MIB)
    step = _AT_ONCE if sparse else len(zeros)
    for at in range(start, end, step):
        length = min(step, end - at)
        if cancel is not None and cancel():
            raise VhdxError(
                "the creation was stopped; nothing was left behind",
                reason=Reason.CANCELLED,
                path=leaf.path,
            )
        if sparse:
            leaf.zero(at, length, no_hole=True)
        else:
            leaf.write(memoryview(zeros)[:length], at)
        if progress is not None:
            progress(at + length - start, end - start)
