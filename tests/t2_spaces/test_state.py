# SPDX-License-Identifier: MIT
"""What pools and volumes store: golden bytes, round trips, damage, and which members may be used."""

from __future__ import annotations

import hashlib
import random
from uuid import UUID

import numpy as np
import pytest

from vhdx import plane
from vhdx.errors import DamagedError, NoSpaceError, UnsupportedError
from vhdx.format.checksum import seal
from vhdx.ledger import Record
from vhdx.spaces.label import LABEL, new_label, newest_label, parse_label, place_parts
from vhdx.spaces.placement import DiskViews, Slabs, entries_of
from vhdx.spaces.state import (
    IN_STEP,
    STALE,
    DiskState,
    Event,
    Kind,
    Out,
    PoolSettings,
    PoolState,
    SpaceState,
    new_rows,
)
from vhdx.spaces.states import DiskStatus, MediaType, Provisioning, Resiliency, Usage
from vhdx.volume.state import FileState, Pages, Run, VolumeState, runs_of

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def label():
    return new_label(
        UUID(int=1), UUID(int=2), size=10 * GIB, slab=256 * MIB, pool_name="pööl", disk_name="d0"
    )


def test_golden_label():
    packed = label().pack()
    assert packed[:4] == b"vlsd"
    assert packed[16:48] == UUID(int=1).bytes + UUID(int=2).bytes
    assert hashlib.sha256(packed).hexdigest() == (
        "dbd01884dd8b9e57684037b04f83f359ff042c9da3629d44cf090a7232f0da26"
    )
    assert parse_label(packed) == label()


def test_the_newest_sound_label_counts():
    first = label()
    second = first.next(pool_name="p", disk_name="d")
    blocks = bytearray(2 * LABEL)
    for each in (first, second):
        blocks[each.place : each.place + LABEL] = each.pack()
    assert newest_label(bytes(blocks)) == second
    blocks[second.place + 100] ^= 1
    assert newest_label(bytes(blocks)) == first
    blocks[first.place + 9] ^= 1
    assert newest_label(bytes(blocks)) is None


def test_hostile_labels_are_refused():
    rng = random.Random(1)
    good = label().pack()
    for _ in range(3000):
        bad = bytearray(good)
        at = 8 + rng.randrange(100) // 4 * 4
        bad[at : at + 4] = rng.randbytes(4)
        seal(bad)
        try:
            found = parse_label(bytes(bad))
        except UnsupportedError:
            continue
        if found is not None:
            assert found.slabs_offset + found.slabs * found.slab <= found.size
            assert found.region_offset + found.region_length <= found.slabs_offset


@pytest.mark.parametrize("size", [0, 4096, 200 * KIB, 4 * MIB, 5 * GIB, 16 << 40])
@pytest.mark.parametrize("slab", [64 * KIB, MIB, 256 * MIB])
def test_parts_of_a_disk_do_not_overlap(size, slab):
    region, first, slabs = place_parts(size, slab)
    assert 64 * KIB + region <= first
    assert slabs == 0 or first + slabs * slab <= size


def pool_state() -> PoolState:
    state = PoolState(PoolSettings(UUID(int=7), "p", MIB))
    for i in range(4):
        disk = DiskState(
            i, UUID(int=100 + i), f"d{i}", f"/d{i}", MediaType.SSD, Usage.AUTO_SELECT, GIB, 500, MIB
        )
        state.apply(*state.disk_record(disk))
    space = SpaceState(
        1, UUID(int=9), "s", Resiliency.MIRROR, Provisioning.THIN, 1, 2, 64 * KIB, 8 * MIB
    )
    state.apply(*state.space_record(space))
    rows = new_rows(2, 1, 3)
    rows[0, 0, 0] = (0, IN_STEP, 0, 3)
    rows[0, 0, 1] = (1, STALE, 0, 4)
    rows[1, 0, 0] = (2, IN_STEP, 0, 0)
    rows[1, 0, 2] = (3, IN_STEP, 0, 1)
    for record in state.rows_records(state.spaces[1], 3, rows):
        state.apply(*record)
    for record in state.marks_records(state.spaces[1], [3, 4], marked=True):
        state.apply(*record)
    for record in state.marks_records(state.spaces[1], [4], marked=False):
        state.apply(*record)
    state.apply(*state.event_record(Event(1, 123, "disk-out", "gone", "d1")))
    out = Out(1, DiskStatus.IO_ERROR, "write", 5, 6, modified=77)
    state.disks[1].out = out
    state.apply(*state.disk_record(state.disks[1]))
    state.apply(*state.owner_record(1, b"volume"))
    return state


def test_records_stand_for_the_whole_state():
    state = pool_state()
    records = list(state.records())
    again = PoolState.from_records(records)
    assert list(again.records()) == records
    assert again.disks == state.disks
    assert (again.spaces[1].rows == state.spaces[1].rows).all()
    assert again.spaces[1].marks == {3}
    assert list(again.owners[1].records()) == [b"volume"]
    assert [each.kind for each in records] == [
        Kind.POOL, *[Kind.DISK] * 4, Kind.SPACE, Kind.ROWS, Kind.MARKS, Kind.OWNER, Kind.EVENT,
    ]  # fmt: skip


def test_golden_records():
    digest = hashlib.sha256()
    for kind, payload in pool_state().records():
        digest.update(bytes([kind]) + payload)
    assert digest.hexdigest() == ("d941a28a83174d8a055d6892e595ba2c0e397895396dc81fb63ee10dd29cfa8e")


def test_records_that_contradict_each_other_are_damage():
    records = list(pool_state().records())
    rng = random.Random(3)
    with pytest.raises(DamagedError):
        PoolState.from_records([])
    for _ in range(2000):
        bad = list(records)
        index = rng.randrange(len(bad))
        kind, payload = bad[index]
        damaged = bytearray(payload)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        bad[index] = Record(rng.choice([kind, kind, rng.randrange(12)]), bytes(damaged))
        if rng.random() < 0.3:
            del bad[rng.randrange(len(bad))]
        try:
            state = PoolState.from_records(bad)
        except DamagedError:
            continue
        for space in state.spaces.values():
            used = space.rows[space.rows["state"] != 0]
            assert all(int(i) in state.disks for i in used["disk"])


def views(*, out=(), gone=()) -> DiskViews:
    state = pool_state()
    state.disks[1].out = None
    for number, index in enumerate(out):
        state.disks[index].out = Out(number + 1, DiskStatus.IO_ERROR, "", 0, 0)
    return DiskViews.of(state, [i for i in range(4) if i not in gone])


def readable(rows, disks, *, marked=True, unreconciled=False) -> list[bool]:
    flags = np.array([marked]), np.array([unreconciled])
    return entries_of(rows, *flags, disks, MIB).readable[0, 0].tolist()


def test_which_members_are_read():
    rows = new_rows(1, 1, 3)
    rows[0, 0] = [(0, IN_STEP, 0, 0), (1, IN_STEP, 0, 0), (0, 0, 0, 0)]
    assert readable(rows, views()) == [True, True, False]
    assert readable(rows, views(), unreconciled=True) == [True, True, False]
    assert readable(rows, views(out=[0])) == [False, True, False]
    assert readable(rows, views(gone=[1])) == [True, False, False]
    # Both are out: the one that went out last has the newest content, unless the row never changed.
    assert readable(rows, views(out=[0, 1])) == [False, True, False]
    assert readable(rows, views(out=[0, 1]), marked=False) == [True, True, False]
    # And if that one is not there, nothing may stand in for it.
    assert readable(rows, views(out=[0, 1], gone=[1])) == [False, False, False]
    assert readable(rows, views(out=[0, 1], gone=[1]), marked=False) == [True, False, False]
    rows[0, 0, 1]["state"] = STALE
    assert readable(rows, views(out=[0])) == [True, False, False]  # it is out, and the last copy
    assert readable(rows, views(gone=[0])) == [False, False, False]


def test_of_unreconciled_rows_one_copy_is_read_and_all_are_written():
    rows = new_rows(1, 1, 3)
    rows[0, 0] = [(0, IN_STEP, 0, 0), (1, IN_STEP, 0, 0), (0, 0, 0, 0)]
    found = entries_of(rows, np.array([True]), np.array([True]), views(), MIB)
    kinds = [int(entry) >> 51 & 7 for entry in found.entries[0]]
    member = plane.MemberKind
    assert kinds == [member.IN_STEP, member.STALE, member.NONE]


def test_slabs_are_taken_first_fit_from_the_emptiest_disks():
    slabs = Slabs(pool_state())
    assert slabs.used(0) == 1
    assert slabs.take(0) == 0
    assert [slabs.take(0) for _ in range(3)] == [1, 2, 4]
    assert slabs.choose([0, 1, 2, 3], 3, "a row") == [1, 2, 3]
    slabs.release(0, 3)
    assert slabs.take(0) == 3
    with pytest.raises(NoSpaceError, match="5 different disks"):
        slabs.choose([0, 1, 2, 3], 5, "a row")


# ---- volumes ----


def test_runs_of_a_file_against_a_dictionary():
    rng = random.Random(5)
    file, model = FileState(1, 0), {}
    for _ in range(1500):
        page, count = rng.randrange(200), rng.randint(1, 20)
        if rng.random() < 0.3:
            file.change([Run(page, (1 << 64) - 1, count)])
            for i in range(count):
                model.pop(page + i, None)
        else:
            place = rng.randrange(1000)
            file.change([Run(page, place, count)])
            model.update({page + i: place + i for i in range(count)})
        first = rng.randrange(200)
        wanted = [model.get(first + i, -1) for i in range(30)]
        assert file.places(first, 30).tolist() == wanted
    assert file.pages == len(model)
    pages = np.array(sorted(model), np.int64)
    assert runs_of(pages, np.array([model[int(p)] for p in pages], np.int64)) == file.runs


def test_volume_records_stand_for_the_whole_state():
    state = VolumeState()
    for number, name in [(1, "a"), (2, "bé")]:
        state.apply(state.file_record(FileState(number, 5 * MIB, b"note")))
        state.apply(state.name_record(name, number))
    state.apply(state.name_record("second", 1))
    for payload in state.extents_records(1, [Run(0, 10, 3), Run(7, 20, 1)]):
        state.apply(payload)
    state.apply(state.name_gone_record("bé"))
    state.apply(state.file_gone_record(2))
    again = VolumeState()
    for payload in state.records():
        again.apply(payload)
    assert (again.files, again.names) == (state.files, state.names)
    assert again.links(1) == 2
    digest = hashlib.sha256(b"".join(state.records()))
    assert digest.hexdigest() == ("89adf3b910e1357102f83720a81b7563c3ba494bf2bc67aa3b89479177842b9e")
    for bad in (b"", b"\x09\x00", b"\x03\x00{}", state.file_gone_record(9), b"\x05\x00abc"):
        with pytest.raises(DamagedError):
            again.apply(bad)
    again.files[3] = FileState(3, MIB, runs=[Run(0, 10, 1)])
    with pytest.raises(DamagedError, match="two files use"):
        Pages(again, 100)
