# SPDX-License-Identifier: MIT
"""Chains: random writes, snapshots, merges, rebases, sizes, reopened all the time, against bytes."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import vhdx
from tests.t2_image.test_model import other_reader
from vhdx.errors import Reason
from vhdx.units import MIB

SIZE = 5 * MIB + 4096


def content(path, **options):
    with vhdx.open(path, **options) as disk:
        return disk.pread(disk.size, 0)


class ChainMachine(RuleBasedStateMachine):
    """One head and its checkpoints; every layer keeps reading what it held."""

    def __init__(self):
        super().__init__()
        base = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(dir=base if base.is_dir() else None))
        self.path = self.directory / "disk.vhdx"
        self.layers = []  # checkpoints, oldest first: path and content
        self.made = 0

    @initialize(block=st.sampled_from([1, 4]), sector=st.sampled_from([512, 4096]))
    def create(self, block, sector):
        vhdx.create(self.path, SIZE, block_size=block * MIB, logical_sector_size=sector)
        self.oracle = bytearray(SIZE)
        self.disk = vhdx.open(self.path, "r+")

    ranges = st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([1, 511, 512, 4096, 65536, MIB, 3 * MIB, 40 * MIB]),
    )

    def _range(self, where, length):
        offset = int(where * len(self.oracle))
        return offset, min(length, len(self.oracle) - offset)

    @rule(where=ranges, byte=st.integers(1, 255), fua=st.booleans())
    def write(self, where, byte, fua):
        offset, length = self._range(*where)
        self.disk.pwrite(bytes([byte]) * length, offset, fua=fua)
        self.oracle[offset : offset + length] = bytes([byte]) * length

    @rule(where=ranges)
    def zero(self, where):
        offset, length = self._range(*where)
        self.disk.zero(offset, length)
        self.oracle[offset : offset + length] = bytes(length)

    @rule(where=ranges)
    def trim(self, where):
        offset, length = self._range(*where)
        self.disk.trim(offset, length)
        found = self.disk.pread(length, offset)
        wanted = self.oracle[offset : offset + length]
        if found != wanted:  # zeros or what was there; never a parent's bytes of before
            pairs = set(zip(found, wanted, strict=True))
            assert all(a in {b, 0} for a, b in pairs)
        self.oracle[offset : offset + length] = found

    @rule()
    def flush(self):
        self.disk.flush()

    @rule(more=st.integers(1, 900))
    def grow(self, more):
        self.disk.resize(len(self.oracle) + more * 4096)
        self.oracle.extend(bytes(more * 4096))

    @rule(less=st.integers(1, 900))
    def shrink(self, less):
        """Below its parent's size a child is refused: the parent would show when it grows again."""
        size = max(4096, len(self.oracle) - less * 4096)
        if self.layers and size < len(self.layers[-1][1]):
            with pytest.raises(vhdx.UnsupportedError):
                self.disk.resize(size, shrink=True, unsafe=True)
        else:
            self.disk.resize(size, shrink=True, unsafe=True)
            del self.oracle[size:]

    @rule()
    def compact(self):
        self.disk.compact()
        assert self.disk.pread(len(self.oracle), 0) == self.oracle

    @precondition(lambda self: len(self.layers) < 6)
    @rule()
    def snapshot(self):
        self.made += 1
        name = self.directory / f"checkpoint{self.made}.vhdx"
        assert self.disk.snapshot(name) == os.fspath(name)
        self.layers.append((name, bytes(self.oracle)))
        assert self.disk.pread(len(self.oracle), 0) == self.oracle

    @precondition(lambda self: self.layers)
    @rule(which=st.integers(0, 5))
    def merge(self, which):
        """Any link: the head into the newest checkpoint, or a checkpoint into the one below."""
        self.disk.close()
        which = min(which, len(self.layers) - 1)
        upper = self.path if which == 0 else self.layers[-which][0]
        lower, _ = self.layers.pop(-1 - which)
        vhdx.merge(upper)
        assert not lower.exists()
        self.disk = vhdx.open(self.path, "r+")
        assert self.disk.pread(len(self.oracle), 0) == self.oracle

    @precondition(lambda self: len(self.layers) >= 2)
    @rule(copy=st.booleans())
    def rebase(self, copy):
        """To the checkpoint below the newest (what differs is copied), or to a copy of the newest."""
        self.disk.close()
        if copy:
            self.made += 1
            name = self.directory / f"copy{self.made}.vhdx"
            shutil.copy(self.layers[-1][0], name)
            vhdx.rebase(self.path, name)
            self.layers[-1][0].unlink()
            self.layers[-1] = (name, self.layers[-1][1])
        else:
            vhdx.rebase(self.path, self.layers[-2][0])
            self.layers.pop()[0].unlink()
        self.disk = vhdx.open(self.path, "r+")
        assert self.disk.pread(len(self.oracle), 0) == self.oracle

    @rule()
    def reopen(self):
        self.disk.close()
        self.check()
        self.disk = vhdx.open(self.path, "r+")

    def check(self):
        assert content(self.path) == self.oracle
        for path, held in self.layers:
            assert content(path) == held

    def teardown(self):
        try:
            if hasattr(self, "disk"):
                self.disk.close()
                self.check()
                names = {path.name for path, _ in self.layers} | {"disk.vhdx"}
                assert {path.name for path in self.directory.iterdir()} == names
        finally:
            shutil.rmtree(self.directory)


class TestChains(ChainMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=25)


@pytest.mark.soak
class TestChainsLong(ChainMachine.TestCase):
    settings = settings(max_examples=1500, stateful_step_count=40, derandomize=False)


@pytest.mark.parametrize("kind", ["pyvhdi", "dissect"])
def test_other_readers_agree_on_a_chain(kind, fast_path):
    """dissect loses sectors where it begins inside a byte of a bitmap: one child, eight at a time."""
    layers = 3 if kind == "pyvhdi" else 2
    path, rng = fast_path / "disk.vhdx", random.Random(7)
    vhdx.create(path, 5 * MIB, block_size=MIB)
    oracle = bytearray(5 * MIB)
    with vhdx.open(path, "r+") as disk:
        for layer in range(layers):
            for _ in range(40):
                length = rng.randrange(1, 20000)
                offset = rng.randrange(len(oracle) - length)
                data = rng.randbytes(length)
                disk.pwrite(data, offset)
                oracle[offset : offset + length] = data
            if layer < layers - 1:
                disk.snapshot(fast_path / f"{layer}.vhdx")
    script = CHAIN_PYVHDI if kind == "pyvhdi" else CHAIN_DISSECT
    assert other_reader(kind, path, len(oracle), fast_path / "out", script) == oracle


CHAIN_PYVHDI = """
import glob, os, sys
import pyvhdi
_, path, size, out = sys.argv[1:]
known = {}
for name in glob.glob(os.path.join(os.path.dirname(path), "*.vhdx")):
    disk = pyvhdi.file()
    disk.open(name)
    known[disk.identifier] = name
def opened(path):
    disk = pyvhdi.file()
    disk.open(path)
    if disk.parent_identifier:
        disk.set_parent(opened(known[disk.parent_identifier]))
    return disk
disk = opened(path)
with open(out, "wb") as file:
    for offset in range(0, int(size), 512):
        file.write(disk.read_buffer_at_offset(512, offset))
"""

CHAIN_DISSECT = """
import sys
from pathlib import Path
from dissect.hypervisor.disk.vhdx import VHDX
_, path, size, out = sys.argv[1:]
disk = VHDX(Path(path))
with open(out, "wb") as file:
    for sector in range(0, int(size) // 512, 8):
        file.write(disk.read_sectors(sector, 8))
"""


def test_snapshot_under_writers(fast_path):
    """A checkpoint holds what had returned before it, and nothing that began after."""
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 8 * MIB, block_size=MIB)
    stop, failures = threading.Event(), []
    written = [0] * 4  # the last number that each writer knows to be written
    with vhdx.open(path, "r+") as disk:

        def work(me):
            number = 0
            try:
                while not stop.is_set():
                    number += 1
                    slot = (number % 512 * 4 + me) * 4096
                    disk.pwrite(number.to_bytes(8, "little") * 512, slot)
                    written[me] = number
                    if number % 50 == 0:
                        disk.flush()
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        taken = []
        for i in range(10):
            before = list(written)
            name = fast_path / f"s{i}.vhdx"
            disk.snapshot(name)
            taken.append((name, before, list(written)))
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    for name, before, after in taken:
        with vhdx.open(name) as disk:
            for me in range(4):
                last = 0
                for i in range(512):
                    page = disk.pread(4096, (i * 4 + me) * 4096)
                    assert page == page[:8] * 512
                    last = max(last, int.from_bytes(page[:8], "little"))
                assert before[me] <= last <= after[me] + 1


def test_a_merge_that_was_cancelled_is_done_again(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 40 * MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"a" * (30 * MIB), 0)
        disk.snapshot(fast_path / "base.vhdx")
        disk.pwrite(b"b" * (20 * MIB), 5 * MIB)
        disk.zero(30 * MIB - 4096, 4096)
        wanted = disk.pread(disk.size, 0)
    asked = []
    with pytest.raises(vhdx.VhdxError) as caught:
        vhdx.merge(path, cancel=lambda: asked.append(1) or len(asked) > 3)
    assert caught.value.reason == Reason.CANCELLED
    assert content(path) == wanted
    assert content(fast_path / "base.vhdx") != wanted
    vhdx.merge(path)
    assert content(path) == wanted
    assert [p.name for p in fast_path.iterdir()] == ["disk.vhdx"]


def test_merge_and_rebase_refuse(fast_path):
    path, other = fast_path / "disk.vhdx", fast_path / "other.vhdx"
    vhdx.create(path, 4 * MIB, block_size=MIB)
    with pytest.raises(vhdx.InvalidArgumentError, match="no parent"):
        vhdx.merge(path)
    vhdx.create(other, 4 * MIB, logical_sector_size=4096)
    with pytest.raises(vhdx.InvalidArgumentError, match="no parent"):
        vhdx.rebase(path, other)
    base = vhdx.snapshot(path)
    assert Path(base).name.startswith("disk-")
    vhdx.create(fast_path / "sibling.vhdx", parent=base)
    with pytest.raises(vhdx.InUseError, match=r"sibling\.vhdx"):
        vhdx.merge(path)
    with vhdx.open(path), pytest.raises(vhdx.InUseError):
        vhdx.merge(path)
    with pytest.raises(vhdx.InvalidArgumentError, match="own parent"):
        vhdx.rebase(path, path)
    with pytest.raises(vhdx.MissingParentError, match="sector size"):
        vhdx.rebase(path, other)
    with pytest.raises(vhdx.ExistsError):
        vhdx.snapshot(path, other)
    assert content(path) == bytes(4 * MIB)


def test_chain_longer_than_the_limit_is_refused(fast_path):
    path = fast_path / "0.vhdx"
    vhdx.create(path, MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"deep", 0)
    for number in range(1, 300):
        vhdx.create(fast_path / f"{number}.vhdx", parent=fast_path / f"{number - 1}.vhdx")
    with vhdx.open(fast_path / "255.vhdx") as disk:
        assert disk.pread(4, 0) == b"deep"
    with pytest.raises(vhdx.MissingParentError) as caught:
        vhdx.open(fast_path / "299.vhdx")
    assert caught.value.reason == Reason.PARENT_DEPTH
