# SPDX-License-Identifier: MIT
"""Finds the footer that makes a file a VHD image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx.errors import VhdxError
from vhdx.format import vhd

if TYPE_CHECKING:
    from vhdx import plane

__all__ = ["find_footer", "has_footer", "known_footer"]


def find_footer(leaf: plane.Device) -> vhd.Footer | None:
    """The footer of a VHD image: the one at the end of the file, or its copy at the start.

    Raises:
        UnsupportedError: the image is of an unknown kind.
    """
    size = leaf.size
    if size < vhd.FOOTER_SIZE:
        return None
    last = vhd.parse_footer(leaf.read(vhd.FOOTER_SIZE, size - vhd.FOOTER_SIZE))
    if last is not None:
        return last
    first = vhd.parse_footer(leaf.read(vhd.FOOTER_SIZE, 0))
    return None if first is None or first.disk_type == vhd.DiskType.FIXED else first


def has_footer(leaf: plane.Device) -> bool:
    """Whether the file ends with a VHD footer."""
    at = leaf.size - vhd.FOOTER_SIZE
    return at >= 0 and vhd.parse_footer(leaf.read(vhd.FOOTER_SIZE, at)) is not None


def known_footer(leaf: plane.Device) -> vhd.Footer | None:
    """The footer if there is one of a known kind, else None."""
    try:
        return find_footer(leaf)
    except VhdxError:
        return None
