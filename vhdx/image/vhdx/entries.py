# SPDX-License-Identifier: MIT
"""Converts BAT entries into map entries: one page per payload block, its state in the tag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.format import bat
from vhdx.format.bat import BlockState

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["OWN", "PARENT", "entries_of", "hole_of", "is_placed"]

OWN, PARENT = 0, 1
"""Indices of an image map's lower devices: the file, and the parent's device."""

_HOLE_TAGS = {
    BlockState.NOT_PRESENT: 0,
    BlockState.UNDEFINED: 1,
    BlockState.ZERO: 2 | plane.TAG_ZERO,
    BlockState.UNMAPPED: 3,
}


def is_placed(kinds: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which kinds of entries have a place in the file."""
    placed: npt.NDArray[np.bool_] = (kinds == plane.Kind.DATA) | (kinds == plane.Kind.MIXED)
    return placed


def hole_of(state: BlockState) -> npt.NDArray[np.uint64]:
    """The entry of a block in ``state``, which stores nothing."""
    return plane.entries(plane.Kind.HOLE, 0, 0, _HOLE_TAGS[state])


def entries_of(
    geometry: bat.Geometry, blocks: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Map entries of payload blocks whose validated BAT entries are ``values``."""
    states, offsets = bat.state_of(values), bat.offset_of(values)
    kinds = np.full(len(values), plane.Kind.HOLE, np.uint64)
    tags = np.zeros(len(values), np.uint64)
    lowers = np.zeros(len(values), np.uint64)
    where = np.zeros(len(values), np.uint64)
    for state, tag in _HOLE_TAGS.items():
        tags[states == state] = tag
    stored = states >= BlockState.FULLY_PRESENT
    where[stored] = offsets[stored]
    tags[stored] = BlockState.FULLY_PRESENT
    kinds[stored] = plane.Kind.DATA
    if geometry.has_parent:
        absent = states == BlockState.NOT_PRESENT
        kinds[absent] = plane.Kind.SHARED
        lowers[absent] = PARENT
        where[absent] = blocks[absent] * np.uint64(geometry.block_size)
        partial = states == BlockState.PARTIALLY_PRESENT
        kinds[partial] = plane.Kind.MIXED
        tags[partial] = BlockState.PARTIALLY_PRESENT
    return plane.entries(kinds, lowers, where, tags)
