# SPDX-License-Identifier: MIT
"""Pages of metadata that a journal keeps in memory."""

from __future__ import annotations

import os

import numpy as np
import pytest

import vhdx
from vhdx import plane
from vhdx.image.vhdx import journal
from vhdx.units import MIB


def test_pages_are_kept_and_bounded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a" * MIB)
    leaf = plane.File(os.open(path, os.O_RDWR), MIB, read_only=False)
    pages = journal.Pages(leaf, 4)
    offsets = np.array([4096, 12288], np.uint64)
    assert pages.read(offsets).tobytes() == b"a" * 8192
    leaf.write(b"b" * 4096, 4096)
    with pytest.raises(AssertionError, match="kept page"):  # kept; and every test would notice
        pages.read(offsets)
    pages.keep(offsets[:1], np.full((1, 4096), ord("b"), np.uint8))
    assert pages.read(offsets)[:, 0].tobytes() == b"ba"
    leaf.write(b"c" * 4096, 12288)
    pages.forget()
    assert pages.read(offsets)[:, 0].tobytes() == b"bc"
    many = np.arange(0, MIB, 8192, dtype=np.uint64)
    assert len(pages.read(many)) == len(many)
    assert len(pages._slots) <= 4


@pytest.mark.parametrize("end", ["shrunk", "grown"])
def test_space_that_becomes_metadata_is_read_again(tmp_path, end):
    """Freed tables are written over by the guest, and then hold metadata again."""
    parent, child = tmp_path / "parent.vhdx", tmp_path / "child.vhdx"
    vhdx.create(parent, 64 * MIB, block_size=MIB)
    vhdx.create(child, parent=parent, block_size=MIB)
    size = 64 * MIB
    with vhdx.open(child, "r+") as disk:
        for step in range(4):
            size = size * 6 + MIB
            disk.resize(size)
            disk.pwrite(b"x" * MIB, step * MIB)
            disk.pwrite(b"y" * 512, size - 512)
            disk.flush()
            disk.compact()
        disk.flush()
        if end == "grown":
            disk.resize(size + MIB)
    with vhdx.open(child) as disk:
        assert disk.pread(512, size - 512) == b"y" * 512
        assert disk.pread(4 * MIB, 0) == b"x" * (4 * MIB)
    assert {found.code for found in vhdx.check(child).findings} <= {"leaked"}
