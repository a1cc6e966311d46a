# SPDX-License-Identifier: MIT
"""The virtual size of an open image: larger and smaller, with a partition table in the way."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading

import pytest

import vhdx
from tests.conftest import absent
from vhdx.image.partitions import read_partitions
from vhdx.units import GIB, MIB, TIB


def qemu(*arguments):
    if not shutil.which("qemu-img"):
        absent("qemu-img")
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["dynamic", "fixed", "differencing"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_random_sizes(kind, sector, fast_path):
    path, rng = fast_path / "disk.vhdx", random.Random(5)
    size = 5 * MIB + 4096
    if kind == "differencing":
        base = fast_path / "base.vhdx"
        vhdx.create(base, size, block_size=4 * MIB, logical_sector_size=sector)
        with vhdx.open(base, "r+") as disk:
            disk.pwrite(b"P" * (size - 4096), 4096)
        vhdx.create(path, parent=base, block_size=MIB)
    else:
        vhdx.create(path, size, block_size=MIB, type=kind, logical_sector_size=sector)
    disk = vhdx.open(path, "r+")
    oracle = bytearray(disk.pread(size, 0))
    for _ in range(40):
        for _ in range(8):
            length = rng.randrange(1, 9000)
            offset = rng.randrange(len(oracle) - length)
            data = rng.randbytes(length)
            disk.pwrite(data, offset)
            oracle[offset : offset + length] = data
        if rng.random() < 0.5:
            new = len(oracle) + rng.randrange(1, 2000) * 4096
            disk.resize(new)
            oracle.extend(bytes(new - len(oracle)))
        elif len(oracle) > size + 8192:
            new = max(size, len(oracle) - rng.randrange(1, 1500) * 4096) // 4096 * 4096
            new = max(new, size)
            disk.resize(new, shrink=True, unsafe=True)
            del oracle[new:]
        if rng.random() < 0.2:
            disk.close()
            disk = vhdx.open(path, "r+")
        assert disk.pread(disk.size, 0) == oracle
    disk.close()
    with vhdx.open(path) as disk:
        assert disk.pread(disk.size, 0) == oracle
    if kind != "differencing" and sector == 512:
        raw = fast_path / "oracle.raw"
        raw.write_bytes(oracle)
        qemu("check", path)
        qemu("compare", "-f", "vhdx", "-F", "raw", path, raw)


def test_table_moves_when_it_must(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 64 * GIB, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"a" * 4096, 64 * GIB - 4096)
        before = disk._image.engine.structure.bat
        disk.resize(1 * TIB)
        after = disk._image.engine.structure.bat
        assert after.offset > before.offset
        assert after.length > before.length
        disk.pwrite(b"b" * 4096, TIB - 4096)
    with vhdx.open(path) as disk:
        assert disk.size == TIB
        assert disk.pread(4096, 64 * GIB - 4096) == b"a" * 4096
        assert disk.pread(4096, TIB - 4096) == b"b" * 4096
    qemu("check", path)


def test_sizes_that_are_refused(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 8 * MIB, block_size=MIB, logical_sector_size=4096)
    with vhdx.open(path) as disk, pytest.raises(vhdx.ReadOnlyError):
        disk.resize(16 * MIB)
    with vhdx.open(path, "r+") as disk:
        for size in (0, -4096, 8 * MIB + 512, 64 * TIB + 4096, 4 * MIB):
            with pytest.raises(vhdx.InvalidArgumentError):
                disk.resize(size)
        with pytest.raises(vhdx.InvalidArgumentError, match="no partition table"):
            disk.resize(4 * MIB, shrink=True)
        assert disk.size == 8 * MIB
        disk.resize(8 * MIB)
        disk.pwrite(b"still", 8 * MIB - 5)


def test_shrinking_a_child_below_its_parent_is_refused(fast_path):
    base, child = fast_path / "base.vhdx", fast_path / "child.vhdx"
    vhdx.create(base, 8 * MIB, block_size=MIB)
    vhdx.create(child, parent=base)
    with vhdx.open(child, "r+") as disk:
        disk.resize(12 * MIB)
        disk.resize(8 * MIB, shrink=True, unsafe=True)
        with pytest.raises(vhdx.UnsupportedError, match="parent would show"):
            disk.resize(4 * MIB, shrink=True, unsafe=True)


def partitioned(path, label):
    """A disk with two partitions, made by sfdisk; the second ends at 40 MiB."""
    if not shutil.which("sfdisk"):
        absent("sfdisk")
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
    kind = "L" if label == "gpt" else "83"
    script = (
        f"label: {label}\nstart=2048,size=20480,type={kind}\nstart=40960,size=40960,type={kind}\n"
    )
    subprocess.run(
        ["sfdisk", "-q", raw], input=script.encode(), check=True, stdout=subprocess.DEVNULL
    )
    vhdx.convert(raw, path, block_size=MIB)


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_partitions_are_in_the_way(label, fast_path):
    path = fast_path / "disk.vhdx"
    partitioned(path, label)
    least = 40 * MIB + (33 * 512 if label == "gpt" else 0)
    with vhdx.open(path, "r+") as disk:
        assert disk.describe()["minimum_size"] == least
        assert disk.minimum_size == least
        with pytest.raises(vhdx.InvalidArgumentError, match="partition 2 ends at 41943040"):
            disk.resize(39 * MIB, shrink=True, unsafe=True)
        disk.resize(least, shrink=True, move_gpt=True)
        assert disk.size == least
    if label == "gpt":  # the second copy is at the new end
        with vhdx.open(path) as disk:
            assert disk.minimum_size == least


def test_a_gpt_that_cannot_be_read_stops_a_shrink(fast_path):
    path = fast_path / "disk.vhdx"
    partitioned(path, "gpt")
    with vhdx.open(path, "r+") as disk:
        for at in (512, 64 * MIB - 512):
            disk.pwrite(b"\xff" * 8, at + 16)
        with pytest.raises(vhdx.InvalidArgumentError, match="cannot be read"):
            disk.resize(50 * MIB, shrink=True, unsafe=True)


def test_hostile_partition_tables():
    rng = random.Random(2)
    disk = bytearray(1 * MIB)
    disk[510:512] = b"\x55\xaa"
    disk[446 + 4] = 0xEE
    disk[446 + 12] = 1
    for _ in range(3000):
        for _ in range(rng.randrange(1, 30)):
            disk[rng.randrange(446, 1100)] = rng.randrange(256)
        disk[510:512] = b"\x55\xaa"
        read_partitions(lambda length, at: bytes(disk[at : at + length]), len(disk), 512)


def test_growing_under_load(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 16 * MIB, block_size=MIB)
    failures, stop = [], threading.Event()
    with vhdx.open(path, "r+") as disk:

        def work(number):
            rng, known = random.Random(number), {}
            try:
                while not stop.is_set():
                    sector = rng.randrange(disk.size // 512 // 4) * 4 + number
                    data = rng.randbytes(512)
                    disk.pwrite(data, sector * 512)
                    known[sector] = data
                    if rng.random() < 0.02:
                        disk.flush()
                    other = rng.choice(list(known))
                    if disk.pread(512, other * 512) != known[other]:
                        failures.append(f"sector {other}")
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for step in range(20):
            disk.resize((20 + 7 * step) * MIB)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
    qemu("check", path)
