# SPDX-License-Identifier: MIT
"""QEMU's bug 727: entries of the BAT that moved by one are found, and go back where that is sure."""

from __future__ import annotations

import random
import struct

import pytest

import vhdx
from tests.images import BAT_OFFSET, edit, read
from vhdx.errors import Reason
from vhdx.format import header
from vhdx.format.bat import BlockState, Geometry
from vhdx.units import MIB

PAGE = 512


class BuggyWriter:
    """Places blocks in the order of the file, and moves a page whenever its first entry changes."""

    def __init__(self, path, size, block):
        vhdx.create(path, size, block_size=block)
        self.path, self.block = path, block
        edit(path, 0, header.pack_identifier("QEMU v6.2.0")[:64])
        self.geometry = Geometry(size, block, 512, False)
        self.entries = [0] * (self.geometry.entries // PAGE + 1) * PAGE
        self.right = set()
        self.end = BAT_OFFSET + self.geometry.table_length

    def place(self, block):
        """Allocates a block as the bug does, and writes its number there."""
        index = self.geometry.index(block)
        value = self.end | BlockState.FULLY_PRESENT
        self.right.add(block)
        if index % PAGE == 0:
            old = self.entries[index : index + PAGE]
            self.entries[index : index + PAGE] = [value, *old[: PAGE - 1]]
        else:
            self.entries[index] = value
        with self.path.open("r+b") as file:
            file.truncate(self.end + self.block)
        edit(self.path, self.end, struct.pack("<Q", block + 1) * 512)
        self.end += self.block

    def finish(self):
        edit(self.path, BAT_OFFSET, struct.pack(f"<{len(self.entries)}Q", *self.entries))


def shows(path, blocks, size):
    """Whether each block of the disk shows its own number."""
    with vhdx.open(path) as disk:
        return all(
            disk.pread(8, block * size) == struct.pack("<Q", block + 1 if block in blocks else 0)
            for block in range(disk.size // size)
        )


@pytest.mark.parametrize("seed", range(12))
def test_moved_entries_go_back(fast_path, seed):
    rng, path = random.Random(seed), fast_path / "disk.vhdx"
    block = rng.choice([8, 16, 32]) * MIB
    # Of 8 MiB blocks only the end of the table tells: the first page has no slot of a bitmap.
    total = rng.randrange(40, 500 if block == 8 * MIB else 4000)
    writer = BuggyWriter(path, total * block - 4096, block)
    ratio = writer.geometry.chunk_ratio
    telling = ratio - 1 if ratio < min(total, PAGE) else total - 1  # it moves to where none can be
    most = min(total, PAGE - 8)
    early = {rng.randrange(1, most) for _ in range(5)} | {telling}
    for each in sorted(early, key=lambda _: rng.random()):
        writer.place(each)
    writer.place(0)
    free = set(range(1, most)) - early - {b + 1 for b in early} - {b - 1 for b in early}
    for each in rng.sample(sorted(free), min(6, len(free))):
        writer.place(each)
    writer.finish()
    report = vhdx.check(path)
    marked = [f for f in report.findings if f.code == "bat_shifted"]
    assert len(marked) == 1
    assert marked[0].repair
    assert marked[0].offset == BAT_OFFSET
    with pytest.raises(vhdx.DamagedError) as caught:
        vhdx.open(path, "r+")
    assert caught.value.reason == Reason.BAT_SHIFTED
    assert not shows(path, writer.right, block)
    with vhdx.open(path) as disk:
        before = disk.describe()["data_write_id"]
    repaired = vhdx.repair(path)
    assert {f.code for f in repaired.repaired} == {"bat_shifted"}
    assert repaired.errors == 0
    assert shows(path, writer.right, block)
    with vhdx.open(path, "r+") as disk:
        assert disk.describe()["data_write_id"] != before


def small(path, *, order=(5, 127, 60)):
    """32 MiB blocks, so that 128 is a bitmap's slot and 127 moves there."""
    writer = BuggyWriter(path, 200 * 32 * MIB, 32 * MIB)
    for block in order:
        writer.place(block)
    writer.place(0)
    return writer


def test_undo_brings_the_damage_back(fast_path):
    path = fast_path / "disk.vhdx"
    small(path).finish()
    table = read(path, BAT_OFFSET, MIB)
    vhdx.repair(path)
    assert read(path, BAT_OFFSET, MIB) != table
    vhdx.undo(path)
    assert read(path, BAT_OFFSET, MIB) == table


def test_the_entry_that_was_lost_comes_back(fast_path):
    path = fast_path / "disk.vhdx"
    writer = BuggyWriter(path, 1000 * 16 * MIB, 16 * MIB)
    lost = next(b for b in range(1000) if writer.geometry.index(b) == PAGE - 1)
    for block in (255, lost, 7, 0):
        writer.place(block)
    writer.finish()
    assert vhdx.repair(path).errors == 0
    assert shows(path, writer.right, 16 * MIB)


def swap(writer):
    """An entry behind the slot of a bitmap, where it cannot have come from."""
    writer.entries[129], writer.entries[6] = writer.entries[6], 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a block was written again", lambda w: w.place(5)),
        ("belong to nothing", lambda w: (setattr(w, "end", w.end + 64 * MIB), w.place(9))),
        ("is not there", lambda w: w.entries.__setitem__(0, 0)),
        ("also when they are moved back", swap),
    ],
)
def test_what_cannot_be_told_is_left(fast_path, name, change):
    path = fast_path / "disk.vhdx"
    writer = small(path)
    change(writer)
    writer.finish()
    table = read(path, BAT_OFFSET, MIB)
    marked = [f for f in vhdx.check(path).findings if f.code == "bat_shifted"]
    assert [f.repair for f in marked] == [False]
    assert name in marked[0].message
    sure = name in {"a block was written again", "belong to nothing"}
    assert bool(vhdx.repair(path).errors) == sure
    if sure:
        with pytest.raises(vhdx.DamagedError, match="convert"):
            vhdx.open(path, "r+")
    assert read(path, BAT_OFFSET, MIB) == table
    if not sure:
        vhdx.open(path, "r+").close()


def test_other_programs_bitmaps_are_no_mark(fast_path):
    path = fast_path / "disk.vhdx"
    small(path).finish()
    edit(path, 0, header.pack_identifier("somebody else")[:64])
    assert "bat_shifted" not in {f.code for f in vhdx.check(path).findings}
