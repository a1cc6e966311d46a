# SPDX-License-Identifier: MIT
"""Metadata as it stands after the log was replayed, whether or not the file was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vhdx import plane
    from vhdx.format.log import Patch

__all__ = ["Overlay"]


class Overlay:
    """Reads a leaf through the patches of a log that was not written to it.

    Owns nothing of the leaf. Bytes past the leaf's end read as zeros, as replay would have extended
    the file with them.
    """

    def __init__(self, leaf: plane.Device, patches: list[Patch], size: int) -> None:
        self._leaf = leaf
        self._patches = patches
        self._starts = np.array([patch.offset for patch in patches], np.int64)
        self._ends = np.array([patch.offset + patch.length for patch in patches], np.int64)
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the file as replay leaves it."""
        return max(self._size, self._leaf.size)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return not self._patches

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of metadata from ``offset`` on."""
        present = max(0, min(length, self._leaf.size - offset))
        data = bytearray(length)
        if present:
            self._leaf.read_into(memoryview(data)[:present], offset)
        touching = np.flatnonzero((self._starts < offset + length) & (self._ends > offset))
        for i in touching:
            patch = self._patches[i]
            start = max(patch.offset, offset)
            end = min(patch.offset + patch.length, offset + length)
            piece = (
                bytes(end - start)
                if patch.data is None
                else patch.data[start - patch.offset : end - patch.offset]
            )
            data[start - offset : end - offset] = piece
        return bytes(data)
