# SPDX-License-Identifier: MIT
"""Forensics: an image through another header, region table or log sequence than the current one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vhdx
from tests.images import add_log, edit, read
from vhdx.format import header
from vhdx.units import MIB


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, 8 * MIB, block_size=MIB)
    return path


def test_nothing_is_replayed(path):
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"x" * 512, 0)
    table = read(path, 3 * MIB, 4096)
    edit(path, 3 * MIB, bytes(4096))
    add_log(path, {3 * MIB: table}, sequence_number=9)
    before = path.read_bytes()
    with vhdx.open(path) as disk:
        assert disk.pread(512, 0) == b"x" * 512
    with vhdx.open(path, view=vhdx.View(log=0)) as disk:
        assert disk.pread(512, 0) == bytes(512)
        assert disk.describe()["log_dirty"]
    with vhdx.open(path, view=vhdx.View(log=9)) as disk:
        assert disk.pread(512, 0) == b"x" * 512
    with pytest.raises(vhdx.DamagedError, match="ends with entry 8"):
        vhdx.open(path, view=vhdx.View(log=8))
    with pytest.raises(vhdx.InvalidArgumentError, match="only read"):
        vhdx.open(path, "r+", view=vhdx.View(log=0))
    assert path.read_bytes() == before


def test_an_earlier_moment_of_the_log(path):
    """Each entry whose tail is there is a moment that can be looked at."""
    disk = vhdx.open(path, "r+")
    for number in range(1, 4):
        disk.pwrite(bytes([number]) * MIB, number * MIB)
        disk.flush()
    data = path.read_bytes()  # as after a crash
    disk.close()
    path.write_bytes(data)
    edit(path, 3 * MIB, bytes(4096))  # what was applied is lost
    program = [sys.executable, "-m", "vhdx.cli", "dump", "log", str(path), "--json"]
    records = json.loads(subprocess.run(program, capture_output=True, check=True).stdout)
    numbers = sorted(r["sequence_number"] for r in records if r["valid"])
    assert len(numbers) == 4
    for count, number in enumerate(numbers):
        with vhdx.open(path, view=vhdx.View(log=number)) as disk:
            found = [disk.pread(1, block * MIB)[0] for block in range(1, 4)]
        # Each entry holds the whole page, so the last counts; its tail is itself.
        assert found == [block if block <= count else 0 for block in range(1, 4)]


def test_the_other_header_and_region_table(path):
    with vhdx.open(path) as disk:
        current = disk.describe()["data_write_id"]
    copies = [header.parse_header(read(path, at, 4096), i) for i, at in enumerate((65536, 131072))]
    old = min(copies, key=lambda copy: copy.sequence_number)
    edit(
        path,
        header.HEADER_OFFSETS[old.slot],
        header.Header(**{**vars(old), "data_write_guid": header.NIL}).pack(),
    )
    with vhdx.open(path, view=vhdx.View(header=old.slot + 1)) as disk:
        assert disk.describe()["data_write_id"] == str(header.NIL)
    with vhdx.open(path) as disk:
        assert disk.describe()["data_write_id"] == current
    edit(path, 196608, b"gone")
    with vhdx.open(path, view=vhdx.View(region_table=2)):
        pass
    with pytest.raises(vhdx.DamagedError, match="region table 1 is not valid"):
        vhdx.open(path, view=vhdx.View(region_table=1))
    edit(path, header.HEADER_OFFSETS[0], b"gone")
    with pytest.raises(vhdx.DamagedError, match="header 1 is not valid"):
        vhdx.open(path, view=vhdx.View(header=1))
    with pytest.raises(vhdx.InvalidArgumentError, match="no header 3"):
        vhdx.View(header=3)


def test_commands_take_a_view(path, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "vhdx.cli", *map(str, arguments)], capture_output=True, text=True
        )

    for command in (
        ["info", path, "--header", "1", "--log", "none"],
        ["dump", "bat", path, "--header", "2", "--region-table", "2"],
        ["convert", path, tmp_path / "out.raw", "--log", "none", "--header", "1"],
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert run("info", path, "--log", "soon").returncode == 2
    assert run("dump", "bat", path, "--header", "3").returncode == 2
