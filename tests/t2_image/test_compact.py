# SPDX-License-Identifier: MIT
"""Compaction gives space back, also while the disk is used, and changes nothing that is read."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
import time

import pytest

import vhdx
from tests.conftest import absent
from vhdx.errors import Reason
from vhdx.units import MIB

SIZE = 64 * MIB


@pytest.fixture(params=["dynamic", "child"])
def image(request, fast_path):
    """Half of its blocks trimmed, some of them zeros, the last ones in use."""
    path, rng = fast_path / "disk.vhdx", random.Random(4)
    vhdx.create(path, SIZE, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        if request.param == "child":
            disk.pwrite(b"P" * (60 * MIB), 0)
            disk.snapshot(fast_path / "base.vhdx")
        for offset in range(0, SIZE, MIB // 2):
            disk.pwrite(rng.randbytes(5000), offset)
        for block in rng.sample(range(0, 64, 2), 16):
            disk.trim(block * MIB, 2 * MIB)
        disk.pwrite(bytes(4 * MIB), 10 * MIB)
    return path


def content(path):
    with vhdx.open(path) as disk:
        return disk.pread(disk.size, 0)


def test_offline(image):
    before, size = content(image), image.stat().st_size
    with vhdx.open(image) as disk:
        guid = disk.describe()["data_write_id"]
    done = vhdx.compact(image)
    assert done.zeroed > 0
    assert done.moved > 0
    assert image.stat().st_size == done.file_size_after < size
    assert content(image) == before
    assert vhdx.check(image).errors == 0
    with vhdx.open(image) as disk:
        assert disk.describe()["data_write_id"] == guid  # so its children stay valid
    again = vhdx.compact(image)
    assert (again.zeroed, again.moved) == (0, 0)
    with vhdx.open(image, "r+") as disk:
        disk.pwrite(b"more" * MIB, 20 * MIB)
    assert content(image)[20 * MIB : 24 * MIB] == b"more" * MIB
    if not (image.parent / "base.vhdx").exists():
        if not shutil.which("qemu-img"):
            absent("qemu-img")
        subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_under_writers(image):
    oracle, failures, stop = bytearray(content(image)), [], threading.Event()
    with vhdx.open(image, "r+") as disk:

        def work(me):
            rng = random.Random(me)
            try:
                while not stop.is_set():
                    at = (rng.randrange(SIZE // 4096 // 3 - 1) * 3 + me) * 4096
                    if rng.random() < 0.02:
                        disk.zero(at, 4096)
                        oracle[at : at + 4096] = bytes(4096)
                        continue
                    data = rng.randbytes(1000)
                    disk.pwrite(data, at + 100)
                    oracle[at + 100 : at + 1100] = data
                    if disk.pread(1000, at + 100) != data:
                        failures.append(at)
                    if rng.random() < 0.02:
                        disk.flush()
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            disk.compact()
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert disk.pread(SIZE, 0) == oracle
    assert content(image) == oracle
    assert vhdx.check(image).errors == 0


def test_cancelled(image):
    before, asked = content(image), []
    with pytest.raises(vhdx.VhdxError) as caught:
        vhdx.compact(image, cancel=lambda: asked.append(1) or len(asked) > 12)
    assert caught.value.reason == Reason.CANCELLED
    assert content(image) == before
    assert vhdx.check(image).errors == 0
    vhdx.compact(image)
    assert content(image) == before


def test_fixed_images_keep_their_space(fast_path):
    path = fast_path / "fixed.vhdx"
    vhdx.create(path, 8 * MIB, block_size=MIB, type="fixed")
    size = path.stat().st_size
    assert vhdx.compact(path).zeroed == 0
    assert path.stat().st_size == size


@pytest.mark.parametrize("block_size", [MIB, 2 * MIB, 32 * MIB], ids=["1M", "2M", "32M"])
@pytest.mark.parametrize("beside_clients", [False, True])
def test_blocks_that_are_written_while_they_move_keep_every_write(
    tmp_path, block_size, beside_clients
):
    path = tmp_path / "disk.vhdx"
    blocks = 6 if block_size == 32 * MIB else 40
    vhdx.create(path, blocks * block_size, block_size=block_size)
    expected = bytearray(blocks * block_size)
    stop, failures = threading.Event(), []

    def write(disk, number: int) -> None:
        rng = random.Random(number)
        own = range(blocks // 2 + number, blocks, 2)  # of the blocks that move
        try:
            while not stop.is_set():
                at = rng.choice(own) * block_size + rng.randrange(block_size // 4096) * 4096
                data = rng.randbytes(4096)
                disk.pwrite(data, at)
                expected[at : at + 4096] = data
                time.sleep(0.005)  # a block that is written all the time stays where it is
        except BaseException as error:
            failures.append(error)

    with vhdx.open(path, "r+") as disk:
        for block in range(blocks):
            data = random.Random(block).randbytes(block_size)
            disk.pwrite(data, block * block_size)
            expected[block * block_size : (block + 1) * block_size] = data
        disk.flush()
        disk.trim(0, blocks // 2 * block_size)
        expected[: blocks // 2 * block_size] = bytes(blocks // 2 * block_size)
        threads = [threading.Thread(target=write, args=(disk, n)) for n in range(2)]
        for thread in threads:
            thread.start()
        done = disk.compact(pace=(lambda size: None) if beside_clients else None)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures
        assert done.moved > 0
        assert disk.pread(len(expected), 0) == expected
    with vhdx.open(path) as disk:
        assert disk.pread(len(expected), 0) == expected
