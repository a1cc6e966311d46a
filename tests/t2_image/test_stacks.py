# SPDX-License-Identifier: MIT
"""Images on maps over several files: content, barriers by stack, and many that flush at once."""

from __future__ import annotations

import os
import random
import threading
import time

import pytest

from tests.stacks import Store, files, image_on
from vhdx import plane
from vhdx.units import MIB

SIZE = 64 * MIB
LEAF = 256 * MIB


def stack(directory, leaves: int, maps: int):
    """(leaves, device): ``maps`` maps over so many files, every page with its place."""
    below: list[plane.Device] = list(files(directory, leaves, LEAF))
    stores = []
    lowers = below
    for level in [plane.Level.SPACE, plane.Level.VOLUME][:maps]:
        store = Store(lowers, sum(d.size - MIB for d in lowers), level)
        stores.append(store)
        lowers = [store.device]
    return below, stores


@pytest.mark.parametrize(
    ("leaves", "maps", "sequence", "dirty", "written"),
    [
        pytest.param(1, 0, 2, 2, 1, id="image"),
        pytest.param(1, 1, 2, 2, 1, id="image on map"),
        pytest.param(4, 1, 2, 5, 4, id="image on map over 4 files"),
        pytest.param(4, 2, 2, 5, 4, id="image on 2 maps over 4 files"),
    ],
)
def test_barriers_of_a_guest_flush(tmp_path, leaves, maps, sequence, dirty, written):
    below, stores = stack(tmp_path, leaves, maps)
    device = stores[-1].device if stores else below[0]

    def barriers():
        return [leaf.barriers for leaf in below]

    def rounds():
        return stores[-1].device.statistics()["rounds"] if stores else sum(barriers())

    with image_on(device, SIZE) as disk:
        disk.pwrite(b"x", 0)
        disk.flush()
        for block in range(1, 48):
            disk.pwrite(b"x", block * MIB)
        before, began = barriers(), rounds()
        disk.flush()
        assert sum(barriers()) - sum(before) <= dirty
        assert rounds() - began == sequence
        disk.flush()  # the entries that were applied to the BAT
        for block in range(48):
            disk.pwrite(b"y", block * MIB)
        before, began = barriers(), rounds()
        disk.flush()
        assert sum(barriers()) - sum(before) == written
        assert rounds() - began == 1
        disk.pwrite(b"z", 0)
        before = barriers()
        disk.flush()
        assert sum(barriers()) - sum(before) == 1  # of the one file that was written
        before = barriers()
        disk.flush()
        assert barriers() == before


@pytest.mark.parametrize("ahead", [True, False], ids=["set aside", "lazy"])
def test_an_image_on_maps_over_four_files_holds_what_was_written(tmp_path, ahead):
    rng = random.Random(7)
    leaves = files(tmp_path, 4, LEAF)
    space = Store(leaves, 4 * (LEAF - MIB), plane.Level.SPACE, ahead=ahead)
    volume = Store(
        [space.device], 4 * (LEAF - 2 * MIB), plane.Level.VOLUME, page=64 << 10, ahead=ahead
    )
    expected = bytearray(SIZE)
    with image_on(volume.device, SIZE) as disk:
        for number in range(400):
            length = rng.choice([512, 4096, 100 << 10, 300 << 10])
            offset = rng.randrange(0, SIZE - length) // 512 * 512
            data = rng.randbytes(length)
            disk.pwrite(data, offset, fua=number % 50 == 0)
            expected[offset : offset + length] = data
            if number % 20 == 0:
                disk.flush()
        assert disk.pread(SIZE, 0) == expected


def test_space_of_blocks_is_set_aside_before_it_is_written(tmp_path):
    (leaf,) = files(tmp_path, 1, LEAF)
    aside: set[int] = set()  # MiB of the file

    def set_aside(offset, length):
        aside.update(range(offset // MIB, (offset + length) // MIB))

    with image_on(leaf, SIZE, set_aside=set_aside) as disk:
        for block in (0, 3, 1, 9):
            disk.pwrite(b"x", block * MIB)
        disk.flush()
        disk.trim(3 * MIB, MIB)
        disk.flush()
        kinds, offsets, _ = plane.fields(disk._image.engine.map.read_entries(0, SIZE // MIB))
        placed = {int(o) // MIB for k, o in zip(kinds, offsets, strict=True) if k == plane.Kind.DATA}
        assert len(placed) == 3
        assert placed <= aside
        assert min(aside) >= 4  # neither header, log, metadata nor BAT


def flush_together(directory, images: int, rounds: int, seconds: float = 0) -> int:
    """How often images on three levels of maps over four files were flushed at once.

    Fails when no image gets on for a minute.
    """
    each = 160 * MIB
    leaves = files(directory, 4, (images + 1) * each // 2)
    space = Store(leaves, (images + 1) * each, plane.Level.SPACE, ahead=False)
    disks, done, failures = [], [0] * images, []
    end = time.monotonic() + seconds

    def work(number: int, disk) -> None:
        rng = random.Random(number)
        try:
            while done[number] < rounds or time.monotonic() < end:
                disk.pwrite(rng.randbytes(512), rng.randrange(SIZE // 512) * 512)
                disk.flush()
                done[number] += 1
        except BaseException as error:
            failures.append(error)

    for number in range(images):
        volume = Store(
            [space.device],
            each - 2 * MIB,
            plane.Level.VOLUME,
            base=number * each + MIB,
            page=64 << 10,
            ahead=False,
        )
        disks.append((image_on(volume.device, SIZE), volume))
    threads = [
        threading.Thread(target=work, args=(number, disk), daemon=True)
        for number, (disk, _) in enumerate(disks)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        before = sum(done)
        threads[0].join(60) if threads[0].is_alive() else time.sleep(0.1)
        stuck = sum(done) == before and threads[0].is_alive()
        assert not stuck, f"they stand still: {done}"
    assert not failures
    for disk, _ in disks:
        disk.close()
    return sum(done)


def test_many_images_that_flush_at_once_do_not_stand_still(tmp_path):
    assert flush_together(tmp_path, images=20, rounds=20) >= 400


@pytest.mark.soak
def test_many_images_that_flush_for_long_do_not_stand_still(tmp_path):
    seconds = float(os.environ.get("VHDX_TEST_SECONDS", "600"))
    print(flush_together(tmp_path, images=20, rounds=20, seconds=seconds), "flushes")
