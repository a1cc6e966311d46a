# SPDX-License-Identifier: MIT
"""Random workloads against a bytearray, on our images and qemu-img's; other readers' verdict."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import vhdx
from tests.conftest import absent
from vhdx.units import MIB

READER = """
import sys
kind, path, size, out = sys.argv[1:]
size = int(size)
if kind == "pyvhdi":
    import pyvhdi
    disk = pyvhdi.file()
    disk.open(path)
    read = disk.read_buffer_at_offset
    assert disk.media_size == size
else:
    from dissect.hypervisor.disk.vhdx import VHDX
    disk = VHDX(open(path, "rb"))
    def read(length, offset):
        disk.seek(offset)
        return disk.read(length)
with open(out, "wb") as file:
    for offset in range(0, size, 65536):
        file.write(read(min(65536, size - offset), offset))
"""


class ImageMachine(RuleBasedStateMachine):
    """create, write, zero, trim, flush, close, reopen; never a differing byte."""

    def __init__(self):
        super().__init__()
        base = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(dir=base if base.is_dir() else None))
        self.path = self.directory / "disk.vhdx"
        self.disk = None

    @initialize(
        block=st.sampled_from([1, 32]),
        sector=st.sampled_from([512, 4096]),
        sectors=st.integers(1, 9 * 2048),
        kind=st.sampled_from(["dynamic", "dynamic", "fixed"]),
        maker=st.sampled_from(["vhdx", "vhdx", "qemu-img"]),
    )
    def create(self, block, sector, sectors, kind, maker):
        if maker == "qemu-img" and shutil.which("qemu-img"):
            self.sector = 512
            # QEMU rounds to MiB by itself, and its fixed images are damaged (bug 806).
            self.size = max(1, sectors // 2048) * MIB
            options = f"subformat=dynamic,block_size={block}M"
            command = ["qemu-img", "create", "-q", "-f", "vhdx", "-o", options]
            subprocess.run([*command, self.path, str(self.size)], check=True)
        else:
            self.sector, self.size = sector, sectors * 512 // sector * sector or sector
            kind = kind if block == 1 else "dynamic"
            vhdx.create(
                self.path,
                self.size,
                type=kind,
                block_size=block * MIB,
                logical_sector_size=sector,
            )
        self.oracle = bytearray(self.size)
        self.disk = vhdx.open(self.path, "r+")

    def _range(self, where, length):
        offset = int(where * self.size)
        return offset, min(length, self.size - offset)

    ranges = st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([1, 511, 512, 4096, 65536, MIB, 3 * MIB, 40 * MIB]),
    )

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
        # Zeros or the old bytes, byte by byte; never another's.
        for at in range(0, length, 4096):
            part = slice(offset + at, min(offset + at + 4096, offset + length))
            got = found[at : at + part.stop - part.start]
            assert all(a in {b, 0} for a, b in zip(got, self.oracle[part], strict=True))
        self.oracle[offset : offset + length] = found

    @rule(where=ranges)
    def read(self, where):
        offset, length = self._range(*where)
        assert self.disk.pread(length, offset) == self.oracle[offset : offset + length]

    @rule()
    def flush(self):
        self.disk.flush()

    @rule()
    def extents_say_the_truth(self):
        at = 0
        for extent in self.disk.extents():
            assert extent.offset == at
            at += extent.length
            if extent.state is not vhdx.ExtentState.DATA:
                assert not any(self.oracle[extent.offset : at])
        assert at == self.size

    @precondition(lambda self: self.disk is not None)
    @rule()
    def reopen(self):
        self.disk.close()
        with vhdx.open(self.path) as disk:
            assert disk.pread(self.size, 0) == self.oracle
        self.disk = vhdx.open(self.path, "r+")

    def teardown(self):
        try:
            if self.disk is not None:
                self.disk.close()
                self.check_with_others()
        finally:
            shutil.rmtree(self.directory)

    def check_with_others(self):
        with vhdx.open(self.path) as disk:
            assert disk.pread(self.size, 0) == self.oracle
            assert not disk.describe()["log_dirty"]
        if not shutil.which("qemu-img") or self.sector != 512:
            return
        raw = self.directory / "oracle.raw"
        raw.write_bytes(self.oracle)
        subprocess.run(["qemu-img", "check", "-q", self.path], check=True)
        command = ["qemu-img", "compare", "-q", "-f", "vhdx", "-F", "raw", self.path, raw]
        subprocess.run(command, check=True)


class TestImages(ImageMachine.TestCase):
    settings = settings(max_examples=75, stateful_step_count=20)


class TestImages2(ImageMachine.TestCase):
    # The same, elsewhere in the space of examples; four shares run in parallel.
    settings = settings(max_examples=75, stateful_step_count=25)


class TestImages3(ImageMachine.TestCase):
    settings = settings(max_examples=75, stateful_step_count=30)


class TestImages4(ImageMachine.TestCase):
    settings = settings(max_examples=75, stateful_step_count=35)


@pytest.mark.soak
class TestImagesLong(ImageMachine.TestCase):
    settings = settings(max_examples=5000, stateful_step_count=25, derandomize=False)


def other_reader(kind, path, size, out, script=READER):
    module = {"pyvhdi": "pyvhdi", "dissect": "dissect.hypervisor"}[kind]
    probe = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
    if probe.returncode:
        absent(module)
    subprocess.run([sys.executable, "-c", script, kind, path, str(size), out], check=True)
    return out.read_bytes()


@pytest.mark.parametrize("kind", ["pyvhdi", "dissect"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_other_readers_agree(kind, sector, fast_path):
    path, size = fast_path / "disk.vhdx", 6 * MIB
    vhdx.create(path, size, block_size=MIB, logical_sector_size=sector)
    oracle = bytearray(size)
    with vhdx.open(path, "r+") as disk:
        for block in (4, 1, 2):
            data = bytes([block]) * (MIB - 8192)
            disk.pwrite(data, block * MIB + 4096)
            oracle[block * MIB + 4096 : (block + 1) * MIB - 4096] = data
        disk.zero(2 * MIB, MIB)
        oracle[2 * MIB : 3 * MIB] = bytes(MIB)
    assert other_reader(kind, path, size, fast_path / "out") == oracle


def test_disk_as_a_file(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 2 * MIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        file = io.BufferedRandom(disk.as_file())
        file.seek(MIB - 5)
        file.write(b"0123456789")
        file.flush()
        file.seek(-1, io.SEEK_END)
        assert file.read() == b"\0"
        file.seek(MIB - 6)
        assert file.read(12) == b"\x000123456789\x00"
        file.detach().close()
        assert disk.pread(10, MIB - 5) == b"0123456789"
        assert disk.pwritev([b"ab", b"cd"], 0) == 4
        pieces = [bytearray(1), bytearray(3)]
        assert disk.preadv(pieces, 0) == 4
        assert pieces == [b"a", b"bcd"]
