# SPDX-License-Identifier: MIT
"""Changes of a pool that meet a repair."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from tests.disk_place import DiskFile, DiskPlace
from vhdx.errors import NoSpaceError, VhdxError
from vhdx.ledger.layout import area_length
from vhdx.plane import Operation
from vhdx.spaces import DiskSpec, Pool, Usage
from vhdx.spaces.repairing import Repairer
from vhdx.volume.volume import Volume

KIB, MIB = 1 << 10, 1 << 20
SLAB = 64 * KIB


def pool_of(disks: int) -> tuple[DiskPlace, Pool]:
    place = DiskPlace({f"d{i}": bytes(8 * MIB) for i in range(disks)})
    specs = [DiskSpec(name, path) for name, path in zip(place.keys, place.paths(), strict=True)]
    return place, Pool.create("p", specs, slab=SLAB, known=False)


def wrong_slabs(pool: Pool) -> list[tuple[str, int, int]]:
    """Slabs that belong to two rows, or are in use and free, or neither."""
    core, wrong = pool._core, []
    with core.lock:
        for index, disk in core.state.disks.items():
            counts = np.zeros(disk.slabs, int)
            for space in core.state.spaces.values():
                mine = (space.rows["state"] != 0) & (space.rows["disk"] == index)
                np.add.at(counts, space.rows["slab"][mine].astype(int), 1)
            for attached in core.spaces.values():
                for where, slab in attached.filling.values():
                    counts[slab] += where == index
            used = core.slabs._used[index]
            odd = np.flatnonzero((counts > 1) | ((counts == 1) != used))
            wrong += [(disk.name, int(slab), int(counts[slab])) for slab in odd]
    return wrong


def wait_for(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_disk_of_a_rebuild_fails_in_the_commit_that_makes_its_slab_a_member(monkeypatch):
    """Else its slab is given to another row."""
    place, pool = pool_of(5)
    pool.create_space("s", 4 * SLAB, columns=1)
    content = os.urandom(4 * SLAB)
    with pool.lease("s") as device:
        device.write(content, 0)
        device.flush()
    switch, failed = Repairer._switch, []

    def fails_once(self, space, job, slot):
        filled = space.filling.get((job.row, job.column, slot))
        if filled is not None and not failed:
            failed.append(filled)
            place.hold(f"d{filled[0]}").set(fail=[Operation.WRITE, Operation.FLUSH])
        return switch(self, space, job, slot)

    monkeypatch.setattr(Repairer, "_switch", fails_once)
    pool.set_usage("d0", Usage.RETIRED)
    wait_for(lambda: failed)
    pool.settle()
    assert pool.report().disks[failed[0][0]].status == "IO error"
    assert wrong_slabs(pool) == []
    with pool.lease("s") as device:
        assert device.read(device.size, 0) == content
    pool.close()


def test_a_space_is_deleted_while_a_slab_of_it_is_filled(monkeypatch):
    """Else the slab is released twice: the second time when another row has it."""
    _, pool = pool_of(4)
    copy = Repairer._copy
    under_way, goes_on = [], []

    def slow(self, space, *what, **how):
        if space.state.name == "x":
            under_way.append(space)
            wait_for(lambda: goes_on)
        copy(self, space, *what, **how)

    monkeypatch.setattr(Repairer, "_copy", slow)
    pool.create_space("x", 4 * SLAB, columns=1)
    pool.create_space("y", 60 * SLAB, columns=1)
    with pool.lease("x") as device:
        device.write(os.urandom(device.size), 0)
    pool.set_usage("d0", Usage.RETIRED)
    wait_for(lambda: under_way)
    pool.delete_space("x")
    content = os.urandom(60 * SLAB)
    with pool.lease("y") as device:
        device.write(content, 0)
        device.flush()
        goes_on.append(True)
        assert pool.settle()
        assert wrong_slabs(pool) == []
        assert device.read(device.size, 0) == content
    assert pool.scrub().different == 0
    pool.close()


def test_a_disk_is_removed_once():
    _, pool = pool_of(5)
    pool.create_space("s", 20 * SLAB, columns=1)
    content = os.urandom(20 * SLAB)
    with pool.lease("s") as device:
        device.write(content, 0)
    ends = []

    def remove():
        try:
            pool.remove_disk("d0")
            ends.append("removed")
        except VhdxError as error:
            ends.append(type(error).__name__)

    threads = [threading.Thread(target=remove) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count("removed") == 1
    assert set(ends) <= {"removed", "InUseError", "NotFoundError"}
    assert wrong_slabs(pool) == []
    with pool.lease("s") as device:
        assert device.read(device.size, 0) == content
    pool.close()


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE, Operation.FLUSH])
def test_a_disk_that_returns_and_fails_keeps_no_pool_from_opening(monkeypatch, operation):
    place, pool = pool_of(5)
    pool.create_space("s", 4 * SLAB, columns=1)
    pool.close()
    key = place.take_away("d0")
    content = os.urandom(4 * SLAB)
    with Pool.open(disks=place.paths(), known=False) as pool, pool.lease("s") as device:
        device.write(content, 0)
    place.bring_back("d0", key)
    open_disk = DiskFile.__init__

    def failing(self, owner, path, **how):
        open_disk(self, owner, path, **how)
        if path.endswith("d0"):
            self.hold.set(fail=[operation])

    monkeypatch.setattr(DiskFile, "__init__", failing)
    with Pool.open(disks=place.paths(), known=False) as pool:
        with pool.lease("s") as device:
            assert device.read(device.size, 0) == content
        if operation is not Operation.READ:  # its ledger can be read
            assert pool.report().disks[0].status != "OK"
    assert [len(files) for files in place.open_files.values()] == [0] * 5


def make_files(volume: Volume, width: int) -> None:
    for count in range(100_000):
        number = volume.create()
        try:
            volume.name_file(number, f"{width}-{count:0{width}}", replace=False)
        finally:
            volume.release(number, write=True, locked=True)


def test_a_full_ledger_has_room_for_what_must_be_possible():
    place, pool = pool_of(5)
    for name in ("s", "v"):
        pool.create_space(name, 4 * SLAB, copies=3, columns=1)
    content = os.urandom(4 * SLAB)
    with pool.lease("s") as device:
        device.write(content, 0)
        volume = Volume(pool, "v")
        for width in (100, 30, 5):
            with pytest.raises(NoSpaceError, match="metadata of the pool"):
                make_files(volume, width)
        names = [file.name for file in volume.files()]
        core = pool._core
        core.ledger.checkpoint(core.state.records())
        area = area_length(core.disks[0].label.region_length)
        assert area // 8 <= core.ledger.room < area // 2
        place.hold("d0").set(fail=list(Operation))
        device.write(content, 0)
        device.flush()
        assert device.read(device.size, 0) == content
        volume.close()
    pool.close()
    place.take_away("d1")
    with Pool.open(disks=place.paths(), known=False) as pool:
        with pool.lease("s") as device:
            assert device.read(device.size, 0) == content
        volume = Volume(pool, "v")
        for name in names[::2]:
            volume.remove(name)
        volume.release(volume.create(), write=True, locked=True)
        volume.close()


def test_a_space_is_deleted_during_a_scrub():
    _, pool = pool_of(4)
    for name in ("s", "t"):
        pool.create_space(name, 4 * SLAB, columns=1)
        with pool.lease(name) as device:
            device.write(os.urandom(device.size), 0)

    def progress(_done, _total):
        if "s" in pool.space_names():
            pool.delete_space("s")

    found = pool.scrub(progress=progress)
    assert (found.complete, found.different, found.unread) == (False, 0, 0)
    assert found.compared == 5 * SLAB
    pool.close()


def test_what_is_on_a_retired_disk_is_copied_only_if_there_is_no_other_copy():
    """It is retired perhaps because what it holds is wrong."""
    place, pool = pool_of(4)
    pool.create_space("s", 8 * SLAB, columns=1)
    content = os.urandom(8 * SLAB)
    with pool.lease("s") as device:
        device.write(content, 0)
        device.flush()
        disk = pool._core.state.disks[0]
        place.memories["d0"].write(os.urandom(8 * SLAB), disk.slabs_offset)
        pool.set_usage("d0", Usage.RETIRED)
        assert pool.settle()
        assert pool.report().disks[0].used_slabs == 0
        assert device.read(device.size, 0) == content
    assert pool.scrub().different == 0
    pool.close()
