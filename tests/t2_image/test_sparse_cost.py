# SPDX-License-Identifier: MIT
"""What an operation costs follows what is stored, and not how large the disk is."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

import vhdx
from vhdx.units import MIB, TIB

SIZE = 64 * TIB


@pytest.fixture
def chain(fast_path):
    """An empty disk of 64 TiB with blocks of 1 MiB, and an empty child."""
    base, child = fast_path / "base.vhdx", fast_path / "child.vhdx"
    vhdx.create(base, SIZE, block_size=MIB)
    vhdx.create(child, parent=base, block_size=MIB)
    return base, child


WORK = {
    "merge": "vhdx.merge(child)",
    "map": "assert len(list(vhdx.open(child).extents())) == 1",
    "convert": "vhdx.convert(child, child + '.out.vhdx')",
    "rebase": "vhdx.rebase(child, other)",
}


@pytest.mark.parametrize("what", WORK)
def test_an_empty_disk_costs_little(chain, fast_path, what):
    """As many parts of the table are loaded as hold something, and not all 131,072 of them."""
    _, child = chain
    other = fast_path / "other.vhdx"
    vhdx.create(other, SIZE, block_size=MIB)
    code = (
        "import sys, time, vhdx\n"
        "from vhdx.image.vhdx.engine import Engine\n"
        "load, loads = Engine.load, []\n"
        "Engine.load = lambda *a: (loads.append(a), load(*a))\n"
        "child, other = sys.argv[1:]\n"
        f"{WORK[what]}\n"
        "print(len(loads), time.process_time())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, child, other]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loads, seconds = done.stdout.split()
    print(f"{what}: {loads} parts of the table loaded, {float(seconds):.2f} s of processor time")
    assert int(loads) < 10


def test_extents_are_those_of_the_table(tmp_path):
    """Whatever is stored, in the file or not yet, above or below: as every entry says it."""
    rng = random.Random(5)
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    size = 40_000 * MIB
    vhdx.create(base, size, block_size=MIB)
    with vhdx.open(base, "r+") as disk:
        for _ in range(40):
            disk.pwrite(os.urandom(600), rng.randrange(size - 600))
    vhdx.create(child, parent=base, block_size=MIB, size=size + 5_000 * MIB)
    with vhdx.open(child, "r+") as disk:
        for turn in range(60):
            at = rng.randrange(disk.size // MIB) * MIB
            what = rng.randrange(4)
            if what == 0:
                disk.zero(at, MIB)
            elif what == 1:
                disk.trim(at, MIB)
            else:
                disk.pwrite(os.urandom(600), min(at + 100, disk.size - 600))
            if turn % 20 == 0:
                disk.flush()
            if turn % 10 == 0:
                low = rng.randrange(disk.size)
                for start, length in ((0, disk.size), (low, rng.randrange(disk.size - low + 1))):
                    expected = merged(disk._device.extents(start, length))
                    found = [
                        (e.offset, e.length, e.state.value, e.depth)
                        for e in disk.extents(start, length)
                    ]
                    assert found == expected


def merged(extents):
    """Runs of equal state as one."""
    names = {0: "data", 1: "zero", 2: "hole"}
    found = []
    for each in extents:
        state, depth = names[each.state], None if each.depth < 0 else each.depth
        if found and found[-1][2:] == (state, depth):
            found[-1] = (found[-1][0], found[-1][1] + each.length, state, depth)
        else:
            found.append((each.offset, each.length, state, depth))
    return found
