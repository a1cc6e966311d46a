# SPDX-License-Identifier: MIT
"""Plans: which layouts are possible on given disks, and what they give."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from vhdx.spaces.label import place_parts

__all__ = ["Plan", "plan"]

_LAYOUTS = (("simple", 1, "no disk"), ("mirror x2", 2, "1 disk"), ("mirror x3", 3, "2 disks"))
_MOST_COLUMNS = 8


@dataclass(frozen=True)
class Plan:
    """A layout on some disks.

    Attributes:
        layout: simple, mirror x2 or mirror x3.
        columns: of the layout.
        capacity: bytes; 0 if it is not possible.
        efficiency: capacity divided by the size of all slabs.
        survives: the loss of how many disks.
        advice: what to add for it, or for more.
    """

    layout: str
    columns: int
    capacity: int
    efficiency: float
    survives: str
    advice: str


def _rows(slabs: list[int], width: int) -> tuple[int, list[int]]:
    """How many rows of so many slabs on different disks fit, and what is left of each disk."""
    heap = [(-count, index) for index, count in enumerate(slabs) if count]
    heapq.heapify(heap)
    rows = 0
    while len(heap) >= width:
        taken = [heapq.heappop(heap) for _ in range(width)]
        # Many rows at once, as long as the same disks stay the fullest.
        least = -taken[-1][0]
        rest = -heap[0][0] if heap else 0
        step = max(1, least - rest)
        step = min(step, least)
        rows += step
        for count, index in taken:
            if -count > step:
                heapq.heappush(heap, (count + step, index))
    left = [0] * len(slabs)
    for count, index in heap:
        left[index] = -count
    return rows, left


def plan(disks: Mapping[str, int], slab: int) -> list[Plan]:
    """Which layouts are possible.

    Args:
        disks: bytes of each disk, by name.
        slab: bytes.
    """
    slabs = [place_parts(size, slab)[2] for size in disks.values()]
    total = sum(slabs)
    found = []
    for layout, copies, survives in _LAYOUTS:
        most = min(len(disks) // copies, _MOST_COLUMNS)
        if most == 0:
            need = copies - len(disks)
            found.append(Plan(layout, 1, 0, 0.0, survives, f"needs {need} more disks"))
        for columns in range(1, most + 1):
            width = columns * copies
            rows, left = _rows(slabs, width)
            capacity = rows * columns * slab
            efficiency = capacity / (total * slab) if total else 0.0
            unused = sum(left)
            having = sum(1 for count in left if count)
            advice = ""
            if unused * 20 > total:
                larger = width - having
                advice = f"{larger} more disk{'s' if larger > 1 else ''} of {max(left)} slabs"
            found.append(Plan(layout, columns, capacity, efficiency, survives, advice))
    return found
